"""A copy of the files that an earlier version wrote, and functions to open its models with this version."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lola_ft.open_model import open_model

FILES = Path(__file__).parent / "files"
WEIGHTS_TIME_NS = 1_750_000_000_000_000_000  # the time that make.py set


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the working directory. `cache/` is used only if a test asks for it."""
    folder = tmp_path / "earlier"
    shutil.copytree(FILES, folder)
    for weights in folder.glob("bases/*/model.safetensors"):
        os.utime(weights, ns=(WEIGHTS_TIME_NS, WEIGHTS_TIME_NS))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "own-cache"))
    return folder


@pytest.fixture(scope="session")
def earlier_logits() -> Callable[[str], torch.Tensor]:
    """Return stored logits by name, such as `adapters/lora` or `finished/gpt2/nf4`."""
    stored = load_file(FILES / "logits.safetensors")
    return lambda name: stored[name]


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Any], torch.Tensor]:
    """Compute the part of a model's logits that is stored."""
    ids = load_file(FILES / "logits.safetensors")["input_ids"]

    @torch.no_grad()
    def compute(model: Any) -> torch.Tensor:
        return model.eval()(ids).logits[:, 1::2, ::4]

    return compute


@pytest.fixture(scope="session")
def open_run() -> Callable[[str, str], Any]:
    """Open a finished run of any family in float32: (folder, "nf4" or "none") to a model."""
    return lambda folder, quantization: (
        open_model(folder, quantization=quantization, dtype="float32", device="cpu").model
    )
