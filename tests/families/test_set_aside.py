"""Tensors that no model loads and a merge copies; and tensors that stay float32 in a 16-bit model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import CheckpointError
from lola_ft.families import architecture_of
from lola_ft.planning.base_weights import base_audit
from lola_ft.planning.merged_sizes import merged_files
from lola_ft.quantization import audit, load_base, quantize_base
from tests.families.conftest import random_adapter
from tests.families.moe import KINDS, make_moe
from tests.grids import slow_but

IDS = torch.randint(6, 320, (2, 13), generator=torch.Generator().manual_seed(1))
FILE = "model.safetensors"
NAMES = {
    "ernie4_5_moe": ("model.mtp_emb_norm.0.weight", "model.mtp_block.0.self_attn.q_proj.weight"),
    "deepseek_v3": ("model.layers.2.mlp.experts.3.gate_proj.weight", "model.layers.2.eh_proj.weight"),
}
CORRECTED = [kind for kind in KINDS if kind in ("deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "minimax_m2")]


@pytest.fixture(params=slow_but(["deepseek_v3"], NAMES))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base with layers that predict further tokens."""
    folder = make_moe(tmp_path / "base", request.param)
    extra = {name: torch.randn(5, 3) for name in NAMES[request.param]}
    save_file(load_file(folder / FILE) | extra, folder / FILE, metadata={"format": "pt"})
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_a_merge_copies_the_tensors_that_loading_leaves_out(base: Path, tmp_path: Path) -> None:
    kind = json.loads((base / "config.json").read_text())["model_type"]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(logits(load_base(base, None, "float32", "cpu", quiet=True)), logits(stock))
    adapter = random_adapter(base, kind, tmp_path / "adapter")
    lola_ft.merge(base, adapter, tmp_path / "merged", rounding="nf4")
    merged, original = load_file(tmp_path / "merged" / FILE), load_file(base / FILE)
    assert merged.keys() == original.keys()
    assert all(torch.equal(merged[name], original[name]) for name in NAMES[kind])
    planned = merged_files(base, BaseCheckpoint.open(base).architecture)
    assert planned == {FILE: (tmp_path / "merged" / FILE).stat().st_size}


def test_tensors_that_a_merge_cannot_copy_are_named(base: Path, tmp_path: Path) -> None:
    kind = json.loads((base / "config.json").read_text())["model_type"]
    adapter = random_adapter(base, kind, tmp_path / "adapter")
    cached = quantize_base(base, "float32", quiet=True)
    name = sorted(NAMES[kind])[0]
    with pytest.raises(CheckpointError, match=rf"2 tensors that no model loads, such as '{name}'"):
        lola_ft.merge(cached, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", CORRECTED)
def test_corrections_of_a_choice_stay_float32_and_are_not_trained(kind: str, moe_bases: dict[str, Path]) -> None:
    """The base is in 16 bits, and is read from its quantised form, too. Every byte of it is planned."""
    for base in (moe_bases[kind], quantize_base(moe_bases[kind], "bfloat16", quiet=True)):
        model = load_base(base, "nf4", "bfloat16", "cpu", quiet=True)
        places = architecture_of(model.config).places
        stored = load_file(moe_bases[kind] / FILE)
        exact = {name: place for name, place in places.items() if place.float32}
        assert exact
        for name, place in exact.items():
            held = getattr(model.get_submodule(place.module), place.leaf)
            assert held.dtype == torch.float32
            assert torch.equal(held, stored[name])
            assert place.correction == (place.parameter in dict(model.named_buffers()))
        planned = base_audit(architecture_of(model.config), "nf4", "bfloat16").as_dict()
        assert audit(model).as_dict() == planned
