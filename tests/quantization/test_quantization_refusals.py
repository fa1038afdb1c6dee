"""Weights that would make a wrong model without a message: not finite, or an untied output head."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lola_ft
from lola_ft.errors import CheckpointError

EXPERT = "transformer.h.1.moe.experts.2.c_fc.weight"


@pytest.fixture
def changed_base(tiny_base: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """Copy the tiny base with its tensors changed by a function."""

    def write(change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
        state = load_file(tiny_base / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
        return folder

    return write


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, "transformer.h.0.attn.c_attn.weight", "transformer.h.3.moe.gate.weight"])
def test_a_weight_that_is_not_finite_is_named(
    name: str, value: float, quantization: str | None, changed_base: Callable[..., Path]
) -> None:
    base = changed_base(lambda state: state[name].view(-1).__setitem__(5, value))
    layer = name.split(".")[2]
    with pytest.raises(CheckpointError, match=rf"h\.{layer}\..*NaN or infinite"):
        lola_ft.load_base(base, quantization, "float32", quiet=True)


def test_finite_weights_whose_sum_overflows_are_taken(changed_base: Callable[..., Path]) -> None:
    base = changed_base(lambda state: state["transformer.wpe.weight"].fill_(3e38))
    lola_ft.load_base(base, "nf4", "float32", quiet=True)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_an_untied_head_is_refused_and_a_copy_is_not(
    quantization: str | None, changed_base: Callable[..., Path]
) -> None:
    base = changed_base(lambda state: state.update({"lm_head.weight": state["transformer.wte.weight"].clone()}))
    lola_ft.load_base(base, quantization, "float32", quiet=True)
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"][7, 3] += 1
    save_file(state, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'lm_head\.weight' differs"):
        lola_ft.load_base(base, quantization, "float32", quiet=True)


def test_a_tensor_in_two_shards_is_refused(changed_base: Callable[..., Path]) -> None:
    base = changed_base(dict.keys)
    (base / "model.safetensors").rename(base / "a.safetensors")
    save_file({EXPERT: torch.zeros(64, 128)}, base / "b.safetensors")
    index = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor '.*experts\.2\.c_fc\.weight' is also in"):
        lola_ft.load_base(base, quiet=True)
