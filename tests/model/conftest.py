"""Tiny models of every kind, the authors' checkpoint, and copies of it that are rewritten on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lola_ft.model import LolaConfig, LolaForCausalLM

GOLDEN_BASE = Path(__file__).parents[1] / "golden" / "base"

ModelMaker = Callable[..., LolaForCausalLM]


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., LolaConfig]) -> ModelMaker:
    """Makes a random model in evaluation mode: four layers, hidden 64, no dropout; keywords change its config."""

    def make(seed: int = 0, **changes: Any) -> LolaForCausalLM:
        torch.manual_seed(seed)
        return LolaForCausalLM(make_config(**{"n_positions": 64} | changes)).eval()

    return make


@pytest.fixture(scope="module")
def model(make_model: ModelMaker) -> LolaForCausalLM:
    """A random model in evaluation mode; do not change it."""
    return make_model()


@pytest.fixture(scope="session")
def golden_base() -> Path:
    """The authors' checkpoint; read only."""
    return GOLDEN_BASE


@pytest.fixture(scope="session")
def golden_model() -> LolaForCausalLM:
    """The authors' checkpoint in the native model, float32, evaluation mode; do not change it."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN_BASE).eval()


class Folder:
    """A copy of the authors' checkpoint whose config and tensors can be rewritten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.weights_file = path / "model.safetensors"
        self.index_file = path / "model.safetensors.index.json"

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.weights_file)

    def set_config(self, **changes: Any) -> None:
        config = json.loads(self.config_file.read_text())
        self.config_file.write_text(json.dumps(config | changes))

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, self.weights_file, metadata={"format": "pt"})

    def cast(self, dtype: torch.dtype) -> None:
        self.set_tensors({name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def shard(self, count: int = 3) -> list[Path]:
        """Deal the tensors out to shards with an index; returns the shards."""
        tensors, weight_map, files = self.tensors, {}, []
        for i in range(count):
            files.append(self.path / f"model-{i + 1:05}-of-{count:05}.safetensors")
            part = {name: tensors[name] for name in list(tensors)[i::count]}
            save_file(part, files[-1], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, files[-1].name)
        self.index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        self.weights_file.unlink()
        return files


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy of the authors' checkpoint, to rewrite."""
    shutil.copytree(GOLDEN_BASE, tmp_path / "base")
    return Folder(tmp_path / "base")
