"""Bases in every form of a Hub folder, and an adapter for them."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lola_ft.adapters.on_disk import write_adapter
from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.families import architecture_of
from lola_ft.model import LolaConfig, LolaForCausalLM

RANKS = {".attn.c_attn": 4, ".attn.c_proj": 3, ".mlp.c_fc": 6, ".mlp.c_proj": 5, ".c_fc": 2, ".c_proj": 7}


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """`base` and `adapter` of the authors; read only."""
    return Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Token ids (2, 32) that visit every expert of the tiny base."""
    return torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def weights(tiny_base: Path) -> AdapterWeights:
    """A random adapter on every target, all ranks different, and the router."""
    result = AdapterWeights(architecture_of(LolaConfig.from_pretrained(tiny_base)))
    for name, place in result.architecture.places.items():
        shape = place.shape
        module = name.removesuffix(".weight")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if module.endswith(".gate"):
            result.trained[name] = torch.randn(shape, generator=generator) * 0.3
        rank = next((rank for end, rank in RANKS.items() if module.endswith(end)), None)
        if rank is not None:
            a = torch.randn(rank, shape[0], generator=generator) * 0.1
            b = torch.randn(shape[1], rank, generator=generator) * 0.1
            result.pairs[module] = LoraPair(a, b, alpha=3.0 + rank)
    return result


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Write an adapter folder."""

    def write(weights: AdapterWeights, name: str = "adapter", layout: str = "peft") -> Path:
        return write_adapter(weights, tmp_path / name, layout)

    return write


@pytest.fixture
def adapter(weights: AdapterWeights, store: Callable[..., Path]) -> Path:
    """`weights` as a folder."""
    return store(weights)


@pytest.fixture
def copy_base(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the tiny base to a folder, in another dtype or with changed config keys."""

    def copy(name: str, dtype: torch.dtype | None = None, **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_base, folder)
        if dtype is not None:
            state = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            config |= {"dtype": str(dtype).removeprefix("torch.")}
        change_config(folder, **config)
        return folder

    return copy


@pytest.fixture
def shard(tiny_base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Write the tiny base in shards of a given size."""

    def write(max_shard_size: str) -> Path:
        LolaForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "shards", max_shard_size=max_shard_size)
        return tmp_path / "shards"

    return write


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="session")
def read_state() -> Callable[[Path], dict[str, Tensor]]:
    """Read every tensor of a checkpoint folder with safetensors' own reader."""

    def read(folder: Path) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = load_file(file)
            assert not state.keys() & part.keys()
            state |= part
        return state

    return read
