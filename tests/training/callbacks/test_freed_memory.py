"""Freed memory goes back to the system when a process has grown, and only then."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lola_ft.recipe import load_recipe
from lola_ft.training.callbacks import resources
from lola_ft.training.callbacks.resources import FreedMemory
from lola_ft.training.run import train


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(resources, "give_back_freed_memory", lambda: calls.append("given back"))
    return calls


def after(memory: FreedMemory, megabytes: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for now in megabytes:
        monkeypatch.setattr(resources, "process_mb", lambda now=now: {"RssAnon": now})
        memory.after_step()


def test_a_process_that_has_grown_gives_back_once(given_back: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FreedMemory()
    after(memory, [100.0] * FreedMemory.FIRST_STEPS + [104.0] * 50, monkeypatch)
    assert not given_back
    after(memory, [106.0], monkeypatch)
    assert len(given_back) == 1
    # What the next steps need counts from there on, however much it is.
    after(memory, [200.0] * 60, monkeypatch)
    assert len(given_back) == 1


def test_a_system_that_does_not_report_memory_is_left_alone(
    given_back: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "process_mb", dict)
    memory = FreedMemory()
    for _ in range(30):
        memory.after_step()
    assert not given_back


def test_a_run_on_a_cpu_looks_after_each_step(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(FreedMemory, "after_step", lambda _: looked.append("looked"))
    train(load_recipe(recipe_file(train={"max_steps": 3}), [f"output={tmp_path / 'run'}"]))
    assert len(looked) == 3
