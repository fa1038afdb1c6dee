"""An exported copy of the authors' checkpoint, and Python environments with several versions of transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from lola_ft.standalone.export import export

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# The newest torch that these versions run on, and PEFT and accelerate of the same time.
OLD_VERSIONS = {
    "4.41.2": ("torch==2.13.0", "transformers==4.41.2", "peft==0.11.1", "accelerate==0.31.0"),
    "4.57.6": ("torch==2.13.0", "transformers==4.57.6", "peft==0.18.0", "accelerate==1.10.1"),
}
UNREACHABLE = r"No matching distribution|Could not find a version|Max retries|NewConnection|Temporary failure|timed out"


@pytest.fixture(scope="session")
def golden_export(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' checkpoint, with the tiny tokenizer and a chat template, exported; read only."""
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN / "base", root / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "base")
    export(root / "base", root / "lola")
    return root / "lola"


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for a process that does not find this checkout and has no access to the Hub."""
    home = str(tmp_path_factory.mktemp("hf"))
    unset = {"PYTHONPATH", "HF_ENDPOINT"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Found:
    """The results of `drive.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = load_file(folder / "tensors.safetensors")
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="session")
def drive(
    golden_export: Path, elsewhere: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Found]:
    """Run `drive.py` with a given Python."""

    def run(python: str) -> Found:
        out = tmp_path_factory.mktemp("found")
        shutil.copyfile(HERE / "drive.py", out / "drive.py")  # so that no folder of this checkout is on the path
        command = [python, "drive.py", golden_export, GOLDEN / "io.safetensors", out, GOLDEN / "adapter"]
        done = subprocess.run(list(map(str, command)), cwd=out, env=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Found(out)

    return run


def python_with(version: str) -> str:
    """Return the Python of an environment with an old version of transformers, which is installed at first use.

    The environment stays in the temporary folder for later runs, because installing takes a minute.
    """
    folder = Path(tempfile.gettempdir(), f"lola-ft-tests-{os.getuid()}", f"transformers-{version}")
    python = folder / "bin" / "python"
    if (folder / "ready").is_file():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *OLD_VERSIONS[version]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search(UNREACHABLE, done.stderr):
        pytest.skip(f"the package index gives no transformers {version} here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (folder / "ready").write_text("")
    return str(python)
