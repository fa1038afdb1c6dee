"""The quantised base on disk: bit-equal, found without being named, and never used for another source."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lola_ft
from lola_ft.errors import CheckpointError
from lola_ft.quantization import NF4Experts, NF4Linear, audit, cache, load, quantize_base

IDS = torch.arange(6, 46).view(2, 20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for one test."""
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A base that may be changed."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets a word each time that weights are quantised again."""
    calls: list[str] = []
    original: Callable[..., None] = load._stream

    def noted(*arguments: object) -> None:
        calls.append("quantised")
        original(*arguments)

    monkeypatch.setattr(load, "_stream", noted)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_loads_bit_equal(dtype: str, base: Path, quantised: list[str]) -> None:
    fresh = lola_ft.load_base(base, "nf4", dtype, quiet=True)
    folder = quantize_base(base, dtype, quiet=True)
    assert quantised == ["quantised"] * 2
    again = lola_ft.load_base(base, "nf4", dtype, quiet=True)
    assert quantised == ["quantised"] * 2  # not a third time
    companions = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == {"nf4.safetensors", "source.json"} | companions
    assert_same(fresh, again)
    assert audit(fresh).as_dict() == audit(again).as_dict()
    assert again.base_fingerprint == fresh.base_fingerprint
    again.train()(IDS, labels=IDS)


def test_another_dtype_is_another_cache(base: Path, quantised: list[str]) -> None:
    quantize_base(base, "bfloat16", quiet=True)
    lola_ft.load_base(base, "nf4", "float32", quiet=True)
    assert len(quantised) == 2


def test_a_changed_source_is_quantised_again(base: Path, quantised: list[str]) -> None:
    """This holds even if the change keeps the file's size and all sampled values."""
    quantize_base(base, "float32", quiet=True)
    state = load_file(base / "model.safetensors")
    state["transformer.h.1.moe.experts.0.c_fc.weight"][3, 5] += 1.0
    save_file(state, base / "model.safetensors")
    changed = lola_ft.load_base(base, "nf4", "float32", quiet=True)
    assert len(quantised) == 2
    value = changed.transformer.h[1].moe.experts.expert_weight("up_proj", 0, torch.float32)[3, 5]
    assert value > 0.5


def test_a_touched_source_is_quantised_again(base: Path, quantised: list[str]) -> None:
    quantize_base(base, "float32", quiet=True)
    os.utime(base / "model.safetensors", (1, 1))
    lola_ft.load_base(base, "nf4", "float32", quiet=True)
    assert len(quantised) == 2


@pytest.mark.parametrize("damage", ["not json", json.dumps({"format": 0})])
def test_a_cache_without_a_valid_record_is_not_used(damage: str, base: Path, quantised: list[str]) -> None:
    folder = quantize_base(base, "float32", quiet=True)
    (folder / "source.json").write_text(damage)
    lola_ft.load_base(base, "nf4", "float32", quiet=True)
    assert len(quantised) == 2


def test_a_truncated_cache_is_named(base: Path) -> None:
    folder = quantize_base(base, "float32", quiet=True)
    weights = folder / "nf4.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"nf4\.safetensors: truncated"):
        lola_ft.load_base(base, "nf4", "float32", quiet=True)


def test_a_full_disk_leaves_no_cache(base: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(cache.SafetensorsWriter):
        def write(self, tensor: torch.Tensor) -> None:
            if tensor.numel() > 1000:
                raise OSError(28, "No space left on device")
            super().write(tensor)

    monkeypatch.setattr(cache, "SafetensorsWriter", FullDisk)
    with pytest.raises(CheckpointError, match=r"cannot be saved \(No space left on device\)"):
        quantize_base(base, "float32", quiet=True)
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Assert that every code, scale and dense value, and the logits, are bit-equal."""
    modules = dict(other.named_modules())
    compared = 0
    for name, module in one.named_modules():
        twin = modules[name]
        if isinstance(module, NF4Linear):
            for part in cache.NF4_PARTS:
                assert torch.equal(getattr(module.stored(), part), getattr(twin.stored(), part))
                compared += 1
        if isinstance(module, NF4Experts):
            for key, tensor in module.state_dict().items():
                assert torch.equal(tensor, twin.state_dict()[key])
                compared += 1
    for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert compared == 12 * 4 + 2 * 10
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)
