"""A function runs after a module was imported; the module itself looks as it does without it."""

import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lola_ft.after_import import _FINDER, run_after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Makes a module that can be imported, and forgets it after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def make(text: str) -> str:
        name = f"module_of_a_test_{tmp_path.name}_{len(names)}"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield make
    for name in names:
        sys.modules.pop(name, None)
        _FINDER.actions.pop(name, None)


def test_runs_once_the_module_is_imported(module: Callable[[str], str]) -> None:
    name, seen = module("value = 1\n"), []
    run_after_import(name, lambda module: seen.append(module.value))
    assert seen == []
    importlib.import_module(name)
    importlib.import_module(name)
    assert seen == [1]


def test_runs_at_once_if_the_module_is_imported_already(module: Callable[[str], str]) -> None:
    name, seen = module("value = 1\n"), []
    importlib.import_module(name)
    run_after_import(name, lambda module: seen.append(module.value))
    assert seen == [1]


def test_runs_again_after_a_reload_and_a_second_import(module: Callable[[str], str]) -> None:
    name, seen = module("value = 1\n"), []
    run_after_import(name, lambda module: seen.append(module.value))
    importlib.reload(importlib.import_module(name))
    assert seen == [1, 1]
    del sys.modules[name]
    importlib.import_module(name)
    assert seen == [1, 1, 1]


def test_the_module_keeps_its_own_loader(module: Callable[[str], str]) -> None:
    text = "def function() -> int:\n    return 1\n"
    name, plain = module(text), importlib.import_module(module(text))
    run_after_import(name, lambda _: None)
    found = importlib.import_module(name)
    assert type(found.__loader__) is type(plain.__loader__)
    assert found.__spec__ is not None
    assert found.__spec__.loader is found.__loader__
    assert inspect.getsource(found) == text


def test_finding_the_module_does_not_run_it(module: Callable[[str], str]) -> None:
    name, seen = module("value = 1\n"), []
    run_after_import(name, seen.append)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    assert spec.loader.get_source(name) == "value = 1\n"  # type: ignore[attr-defined]
    assert spec.origin is not None
    assert seen == []
    assert name not in sys.modules


def test_a_module_that_does_not_exist_is_not_found(module: Callable[[str], str]) -> None:
    name = module("") + "_missing"
    run_after_import(name, lambda _: None)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    finally:
        del _FINDER.actions[name]


def test_a_module_that_fails_runs_nothing(module: Callable[[str], str]) -> None:
    name, seen = module("raise ValueError('broken')\n"), []
    run_after_import(name, seen.append)
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(name)
    assert seen == []
    assert name not in sys.modules


def test_two_copies_of_the_finder_do_not_ask_each_other_for_ever(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are two after `importlib.reload(lola_ft.after_import)`."""
    name, seen = module("value = 1\n"), []
    run_after_import(name, lambda _: seen.append("first"))
    second = type(_FINDER)()
    second.actions[name] = lambda _: seen.append("second")
    monkeypatch.setattr(sys, "meta_path", [second, *sys.meta_path])
    assert importlib.import_module(name).value == 1
    assert sorted(seen) == ["first", "second"]


def test_threads_that_import_together_see_the_action_done(module: Callable[[str], str]) -> None:
    name, late = module("import time\ntime.sleep(0.2)\nvalue = 1\n"), []

    def mark(module: ModuleType) -> None:
        module.marked = True  # type: ignore[attr-defined]

    def work() -> None:
        if not hasattr(importlib.import_module(name), "marked"):
            late.append(name)

    run_after_import(name, mark)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert late == []


def test_an_action_that_comes_while_another_thread_imports_waits_for_the_end(module: Callable[[str], str]) -> None:
    name, seen = module("import time\ntime.sleep(0.3)\nvalue = 1\n"), []
    thread = threading.Thread(target=importlib.import_module, args=(name,))
    thread.start()
    while name not in sys.modules:
        pass
    run_after_import(name, lambda module: seen.append(module.value))
    thread.join()
    assert seen == [1]
