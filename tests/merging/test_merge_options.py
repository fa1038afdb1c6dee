"""Merging of adapters with more than plain LoRA: router, norms, DoRA, selected experts, LoftQ."""

import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter, save_adapter
from lola_ft.adapters.loftq import start_at_rounding_error
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import AdapterError, CheckpointError, UserError
from lola_ft.merging.proof import prove
from tests.grids import slow_but

PARITY = 1e-4  # float32 sums have another order, through four layers
KINDS = {
    "router": AdapterSettings(router_rank=3, expert_rank=2),
    "norms": AdapterSettings(mlp_rank=2, tune_norms=True),
    "biases": AdapterSettings(attention_rank=2, expert_rank=2, tune_biases=True),
    "norms and biases with dora": AdapterSettings(mlp_rank=2, dora=True, tune_norms=True, tune_biases=True),
    "biases of some experts": AdapterSettings(expert_rank=2, tune_biases=True, selection=((0, 2), (3,))),
    "dora": AdapterSettings(attention_rank=3, mlp_rank=5, expert_rank=2, dora=True),
    "rslora, some experts": AdapterSettings(expert_rank=2, rslora=True, selection=((0, 2), (3,))),
    "a group's own alpha": AdapterSettings(attention_rank=2, expert_rank=2, alphas={"experts": 5.0}),
}


def trained(base: Path, settings: AdapterSettings, quantization: str | None = None) -> Any:
    """Return a model with an adapter whose tensors have all changed."""
    torch.manual_seed(0)
    model = add_adapter(lola_ft.load_base(base, quantization, "float32", "cpu", quiet=True), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_merged_computes_what_was_trained(kind: str, tiny_base: Path, ids: Tensor, tmp_path: Path) -> None:
    model = trained(tiny_base, KINDS[kind])
    layout = "per_expert" if "some" in kind else "peft"
    save_adapter(model, tmp_path / "adapter", layout)
    report = lola_ft.merge(tiny_base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits
        assert_close(merged(ids).logits, expected, atol=PARITY, rtol=0)
        assert (base(ids).logits - expected).abs().max() > 100 * PARITY
    assert report.applied == report.adapter_tensors == report.weights.applied_once
    assert report.biases == {"biases": 37, "norms and biases with dora": 28, "biases of some experts": 27}.get(kind, 0)
    assert report.weights.largest_error <= 1


@pytest.mark.parametrize(
    ("rounding", "dtype"),
    slow_but([("base", "bfloat16")], itertools.product(("base", "nf4"), ("float32", "bfloat16"))),
)
def test_dora_is_merged_with_both_roundings(rounding: str, dtype: str, tiny_base: Path, tmp_path: Path) -> None:
    """Lengths are those of the weights that the update is added to, and bfloat16 rounds once."""
    save_adapter(trained(tiny_base, KINDS["dora"]), tmp_path / "adapter")
    report = lola_ft.merge(tiny_base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype, rounding=rounding)
    assert report.weights.largest_error <= 1
    assert report.weights.applied_once + len(report.weights.below_rounding) >= report.adapter_tensors


@pytest.mark.parametrize("kind", ["router", "norms", "biases", "dora"])
def test_damage_is_found(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    """A changed weight whose update has the wrong sign does not pass."""
    save_adapter(trained(tiny_base, KINDS[kind]), tmp_path / "adapter")
    lola_ft.merge(tiny_base, tmp_path / "adapter", tmp_path / "merged", check="weights")
    name = {
        "router": "transformer.h.1.moe.gate.weight",
        "norms": "transformer.h.2.ln_1.bias",
        "biases": "transformer.h.3.moe.experts.2.c_fc.bias",
        "dora": "transformer.h.0.attn.c_attn.weight",
    }[kind]
    from lola_ft.adapters.on_disk import read_adapter
    from lola_ft.checkpoints.safetensors_file import bytes_of
    from lola_ft.merging.merge_base import CheckpointBase

    file = tmp_path / "merged" / "model.safetensors"
    state = load_file(file)
    original = load_file(tiny_base / "model.safetensors")[name]
    state[name] = 2 * original - state[name]
    save_file(state, file, metadata={"format": "pt"})
    sums = {key: zlib.crc32(bytes_of(tensor)) for key, tensor in state.items()}
    base = CheckpointBase.open(BaseCheckpoint.open(tiny_base), "base")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        prove(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged", None, sums)


def test_biases_equal_to_the_bases_are_refused_as_no_change(tiny_base: Path, tmp_path: Path) -> None:
    """Trained weights that are bit-equal to the base's change nothing, so there is nothing to merge."""
    base = lola_ft.load_base(tiny_base, None, "float32", "cpu", quiet=True)
    save_adapter(add_adapter(base, AdapterSettings(tune_biases=True)), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="The adapter changes nothing"):
        lola_ft.merge(tiny_base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.slow
def test_untrained_rows_of_a_stack_are_not_counted(biased_base: Path, ids: Tensor, tmp_path: Path) -> None:
    """In the layout `peft` the rows of other experts are the base's, which do not count as the adapter's."""
    model = trained(biased_base, AdapterSettings(mlp_rank=2, tune_biases=True, dora=True, selection=((0, 2), (3,))))
    save_adapter(model, tmp_path / "adapter")
    report = lola_ft.merge(biased_base, tmp_path / "adapter", tmp_path / "merged")
    assert (report.biases, report.adapter_tensors) == (27, 27 + 2 * 2 * 3)
    assert report.weights.applied_once == report.adapter_tensors
    assert report.weights.touched == 27 + 2 * 2
    assert report.weights.below_rounding == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert_close(merged(ids).logits, model(ids).logits, atol=PARITY, rtol=0)


@pytest.mark.slow
def test_loftq_is_merged_only_into_rounded_weights(
    tiny_base: Path, ids: Tensor, tmp_path: Path, read_state: Callable[[Path], dict[str, Tensor]]
) -> None:
    base = lola_ft.load_base(tiny_base, "nf4", "float32", "cpu", quiet=True)
    model = add_adapter(base, AdapterSettings(attention_rank=8, expert_rank=8)).eval()
    start_at_rounding_error(model, BaseCheckpoint.open(tiny_base))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"loftq.* --rounding nf4"):
        lola_ft.merge(tiny_base, tmp_path / "adapter", tmp_path / "merged", rounding="base")
    assert not (tmp_path / "merged").exists()
    report = lola_ft.merge(tiny_base, tmp_path / "adapter", tmp_path / "merged")
    assert report.rounding == "nf4"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert_close(merged(ids).logits, model(ids).logits, atol=PARITY, rtol=0)
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["rounding"] == "nf4"
    assert read_state(tmp_path / "merged").keys() == read_state(tiny_base).keys()
