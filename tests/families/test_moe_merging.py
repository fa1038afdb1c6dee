"""Merges of mixtures of experts: streamed, proved, in the base's layout. The reference is stock PEFT's merge."""

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import CheckpointError
from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.merging.deltas import Deltas
from lola_ft.quantization import load_base, quantize_base
from tests.families.conftest import random_adapter
from tests.families.moe import KINDS

IDS = torch.randint(6, 320, (2, 13), generator=torch.Generator().manual_seed(1))
FILE = "model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:The following")  # PEFT applies patterns that its warning calls ignored
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@every_kind
@pytest.mark.parametrize("layout", ["peft", "per_expert"])
def test_a_merge_is_what_stock_peft_merges(kind: str, layout: str, moe_bases: dict[str, Path], tmp_path: Path) -> None:
    base = moe_bases[kind]
    settings = {"tune_router": True, "tune_norms": True} if layout == "per_expert" else {}
    adapter = random_adapter(base, kind, tmp_path / "adapter", layout, **settings)
    report = lola_ft.merge(base, adapter, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / FILE).keys() == load_file(base / FILE).keys()
    merged, original = (
        {entry.name: entry.read() for entry in BaseCheckpoint.open(folder)} for folder in (tmp_path / "merged", base)
    )
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, original[name])]
    assert report.changed == len(changed)
    same = report.weights.without_update
    assert all(name.endswith("e_score_correction_bias") for name in same)  # stored with its router, but not trained
    assert report.applied == report.adapter_tensors == report.weights.applied_once + len(same)
    assert (report.weights.touched - len(same), report.weights.touched + report.weights.untouched) == (
        len(changed),
        len(merged),
    )
    assert report.verification.compared == report.verification.tokens
    if layout == "per_expert":
        lola_ft.save_adapter(
            lola_ft.load_adapter(load_base(base, None, "float32", "cpu", quiet=True), adapter), tmp_path / "peft"
        )
        adapter = tmp_path / "peft"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    state = ours.state_dict()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-5, rtol=1e-4)


@every_kind
def test_a_merge_into_rounded_weights_is_the_4_bit_base_plus_adapter(
    kind: str, moe_bases: dict[str, Path], moe_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The numbers are the same if only the 4-bit form of the base exists."""
    base, adapter = moe_bases[kind], moe_adapters[kind]
    lola_ft.merge(base, adapter, tmp_path / "merged", rounding="nf4", check="weights")
    ours = lola_ft.load_adapter(load_base(base, "nf4", "float32", "cpu", quiet=True), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(ours), atol=1e-5, rtol=1e-4)
    cached = quantize_base(base, "float32", quiet=True)
    lola_ft.merge(cached, adapter, tmp_path / "again", check="weights")
    first, second = load_file(tmp_path / "merged" / FILE), load_file(tmp_path / "again" / FILE)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_the_proof_finds_gate_and_up_exchanged(
    kind: str, moe_bases: dict[str, Path], moe_adapters: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """The merge is broken on purpose, and its proof has to find it."""
    right = ExpertLayout.part_of
    monkeypatch.setattr(ExpertLayout, "part_of", lambda *args: (right(*args)[1] - 1 - right(*args)[0], right(*args)[1]))
    with pytest.raises(CheckpointError, match="is not base plus update"):
        lola_ft.merge(moe_bases[kind], moe_adapters[kind], tmp_path / "merged", check="weights")
    assert not (tmp_path / "merged").exists()


def test_the_proof_finds_experts_exchanged(
    moe_bases: dict[str, Path], moe_adapters: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    right = Deltas._stack
    monkeypatch.setattr(Deltas, "_stack", lambda self, key: right(self, key).roll(1, dims=1))
    with pytest.raises(CheckpointError, match="is not base plus update"):
        lola_ft.merge(moe_bases["olmoe"], moe_adapters["olmoe"], tmp_path / "merged", check="weights")


def test_an_update_of_one_expert_changes_that_expert_only(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    base = moe_bases["mixtral"]
    adapter = random_adapter(
        base, "mixtral", tmp_path / "adapter", router_rank=None, attention_rank=None, selection=((2,), ())
    )
    report = lola_ft.merge(base, adapter, tmp_path / "merged")
    merged, original = load_file(tmp_path / "merged" / FILE), load_file(base / FILE)
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, original[name])}
    prefix = "model.layers.0.block_sparse_moe.experts.2"
    assert changed == {f"{prefix}.{name}.weight" for name in ("w1", "w2", "w3")}
    assert report.adapter_tensors == 6


@pytest.mark.slow
def test_a_base_in_16_bit_and_several_files_is_merged_file_by_file(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(moe_bases["olmoe"], base)
    state = {name: tensor.bfloat16() for name, tensor in load_file(base / FILE).items()}
    save_file(state, base / FILE, metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(
        tmp_path / "sharded", max_shard_size="100KB"
    )
    adapter = random_adapter(tmp_path / "sharded", "olmoe", tmp_path / "adapter")
    report = lola_ft.merge(tmp_path / "sharded", adapter, tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").glob("*.safetensors*")} == {
        file.name for file in (tmp_path / "sharded").glob("*.safetensors*")
    }
    assert report.weights.applied_once + 2 * len(report.weights.below_rounding) == report.adapter_tensors
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert logits(merged).isfinite().all()
