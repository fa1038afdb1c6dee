"""Commands that need no model answer at once: they import none of the libraries that take seconds."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.grids import slow_but

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "lm_eval", "matplotlib", "numpy", "pandas", "peft"),
    *("pyarrow", "safetensors", "scipy", "tokenizers", "torch", "transformers", "triton", "trl"),
}
COMMANDS = {
    "help": (0, ["-m", "lola_ft", "--help"]),
    "help of a verb": (0, ["-m", "lola_ft", "train", "--help"]),
    "recipes list": (0, ["-m", "lola_ft", "recipes", "list"]),
    "recipes show": (0, ["-m", "lola_ft", "recipes", "show", "demo"]),
    "families": (0, ["-m", "lola_ft", "families"]),
    "schema": (0, ["-m", "lola_ft", "schema"]),
    "unknown option": (2, ["-m", "lola_ft", "train", "--wrong"]),
    "mistake, train": (2, ["-m", "lola_ft", "train", "MISTAKE"]),
    "mistake, preview": (2, ["-m", "lola_ft", "preview", "MISTAKE"]),
    "mistake, plan": (2, ["-m", "lola_ft", "plan", "MISTAKE"]),
    "mistake, finetune.py": (2, [str(ROOT / "finetune.py"), "MISTAKE"]),
    "taken, merge": (2, ["-m", "lola_ft", "merge", "TAKEN"]),
    "taken, merge --out": (2, ["-m", "lola_ft", "merge", "adapter", "--out", "TAKEN"]),
    "taken, convert": (2, ["-m", "lola_ft", "convert", "a", "--base", "b", "--layout", "peft", "--out", "TAKEN"]),
    "taken, export": (2, ["-m", "lola_ft", "export", "base", "--out", "TAKEN"]),
    "import": (0, ["-c", "import lola_ft"]),
}


@pytest.fixture
def mistake(tmp_path: Path) -> Path:
    """A recipe with a misspelt key."""
    path = tmp_path / "mistake.yaml"
    path.write_text("base: {model: some/base}\nadapter: {rnak: 8}\n", encoding="utf-8")
    return path


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A run that is merged already."""
    run = tmp_path / "run"
    (run / "merged" / "earlier").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    return run


def python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout's lola_ft."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def packages_imported(stderr: str) -> set[str]:
    """Read the packages' names from what `-X importtime` prints."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


FAST = ("help", "recipes list", "mistake, train", "mistake, finetune.py", "taken, merge", "import")


@pytest.mark.parametrize("name", slow_but(FAST, COMMANDS))
def test_imports_nothing_heavy(name: str, mistake: Path, taken: Path) -> None:
    code, arguments = COMMANDS[name]
    places = {"MISTAKE": str(mistake), "TAKEN": str(taken)}
    done = python(["-X", "importtime", *[places.get(word, word) for word in arguments]])
    assert done.returncode == code, done.stderr
    if "MISTAKE" in arguments:
        assert "rnak" in done.stderr
    if "TAKEN" in arguments:
        assert "exists and is not empty" in done.stderr
    imported = packages_imported(done.stderr)
    assert "lola_ft" in imported
    assert not imported & HEAVY


def test_heavy_packages_are_seen_where_they_are_imported() -> None:
    assert "numpy" in packages_imported(python(["-X", "importtime", "-c", "import numpy"]).stderr)


@pytest.mark.slow
def test_a_mistake_shows_in_half_the_time_of_importing_torch(mistake: Path) -> None:
    """A sixth, measured on two cores; `benchmarks/startup.py` has the numbers."""

    def fastest_of_three(arguments: list[str]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            python(arguments)
            times.append(time.perf_counter() - began)
        return min(times)

    torch = fastest_of_three(["-c", "import torch"])
    assert fastest_of_three([str(ROOT / "finetune.py"), str(mistake)]) < torch / 2
    assert fastest_of_three(["-m", "lola_ft", "recipes", "list"]) < torch / 2


SETTINGS = """
import sys
import lola_ft.start
assert "torch" not in sys.modules
lola_ft.start.prepare_process()
import os
print(*(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "LRU_CACHE_CAPACITY")))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one of the two is set on x86 only")
def test_a_command_sets_what_torchs_libraries_read_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "500")
    assert python(["-c", SETTINGS]).stdout.split() == ["PASSIVE", "500"]
