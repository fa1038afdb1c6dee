"""The proof from the files, and every kind of damage that it must find."""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lola_ft.adapters.on_disk import read_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_file import read_header
from lola_ft.errors import CheckpointError
from lola_ft.families import LOLA
from lola_ft.merging import merge
from lola_ft.merging.adapter_keys import factor_keys
from lola_ft.merging.deltas import Deltas
from lola_ft.merging.merge_base import CheckpointBase
from lola_ft.merging.proof import WeightProof, prove
from lola_ft.merging.stream import _Sink, write_weights

EXPERT = "transformer.h.3.moe.experts.1.c_fc.weight"


def reproved(base: Path, adapter: Path, merged: Path, rounding: str = "base") -> WeightProof:
    """Return the proof of a folder in its present state, with checksums to match."""
    source, stored = CheckpointBase.open(BaseCheckpoint.open(base), rounding), read_adapter(adapter)
    checksums = crc_of(merged)
    return prove(source, stored, merged, None, checksums)


def crc_of(merged: Path) -> dict[str, int]:
    return {
        entry.name: zlib.crc32(entry.read().view(-1).view(torch.uint8).numpy().tobytes())
        for entry in read_header(merged / "model.safetensors")
    }


def rewrite(merged: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(merged / "model.safetensors")
    change(state)
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["peft", "per_expert"])
@pytest.mark.parametrize("rounding", ["base", "nf4"])
def test_a_right_merge_is_proved(
    layout: str, rounding: str, weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    adapter = store(weights, layout=layout)
    proof = merge(tiny_base, adapter, tmp_path / "merged", rounding=rounding, check="weights").weights
    assert proof is not None
    held = BaseCheckpoint.open(tiny_base).entries
    assert (proof.tensors, proof.touched, proof.untouched) == (len(held), 30, len(held) - 30)
    assert proof.rows == 4 * 30
    assert proof.applied_once == 58
    assert proof.below_rounding == []
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "gate", "experts", "c_fc")
    assert all(any(kind in name for name in proof.sample) for kind in kinds)
    assert len(proof.sample) == len(set(proof.sample)) == 12
    assert 0 < proof.largest_error < 1
    assert 0 < proof.largest_unmerge_error < 1
    assert 0.1 < proof.unmerged_exactly <= 1


def test_the_sample_is_the_same_each_time(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    first = merge(tiny_base, adapter, tmp_path / "one", check="weights").weights
    assert first == merge(tiny_base, adapter, tmp_path / "two", check="weights").weights


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", ["auto", "float32", "bfloat16"])
def test_a_merge_in_every_dtype_is_proved(
    stored: torch.dtype, option: str, adapter: Path, copy_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = copy_base("base16", stored)
    proof = merge(base, adapter, tmp_path / "merged", dtype=option, check="weights").weights
    assert proof is not None
    assert proof.applied_once == 58
    assert proof.largest_error <= 1


def test_an_update_below_rounding_is_reported(
    weights: AdapterWeights, store: Callable[..., Path], copy_base: Callable[..., Path], tmp_path: Path
) -> None:
    for module, pair in weights.pairs.items():
        if ".mlp.c_fc" in module:
            pair.b.mul_(1e-7)
    proof = merge(copy_base("base", torch.bfloat16), store(weights), tmp_path / "merged", check="weights").weights
    assert proof is not None
    assert proof.below_rounding == [f"transformer.h.{n}.mlp.c_fc.weight" for n in (0, 2)]
    assert proof.applied_once == 58 - 4


def test_an_expert_that_was_not_reached_is_told_from_one_below_rounding(
    weights: AdapterWeights,
    store: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    verb: Callable[..., Any],
) -> None:
    """An unused expert's B stays zero. No output dtype would show an update, and none is recommended."""
    experts = [module for module in weights.pairs if ".h.3.moe.experts.2." in module]
    for module in experts:
        weights.pairs[module].b.zero_()
    adapter = store(weights)
    done = verb("merge", adapter, "--base", tiny_base, "--out", tmp_path / "merged", "--check", "weights")
    assert done.code == 0, done.err
    proof = json.loads((tmp_path / "merged" / "merge_report.json").read_text())["weights"]
    assert proof["without_update"] == [f"{module}.weight" for module in experts]
    assert proof["below_rounding"] == []
    assert proof["applied_once"] == 58 - 4
    printed = " ".join(done.out.split())
    assert "For 2 weights the adapter's update is zero" in printed
    assert "float32 would keep it" not in printed


# Broken on purpose


def swap_experts(state: dict[str, Tensor]) -> None:
    other = EXPERT.replace("experts.1", "experts.2")
    state[EXPERT], state[other] = state[other], state[EXPERT]


def transpose(state: dict[str, Tensor]) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    state[name] = state[name].t().contiguous()


def flip_a_bit(state: dict[str, Tensor]) -> None:
    state["transformer.wte.weight"].view(torch.int32)[7, 3] ^= 1


def flip_the_sign_of_zero(state: dict[str, Tensor]) -> None:
    state["transformer.h.0.ln_1.bias"][0] = -0.0


def a_nan(state: dict[str, Tensor]) -> None:
    state[EXPERT][:, 5] = float("nan")


def another_router(state: dict[str, Tensor]) -> None:
    state["transformer.h.1.moe.gate.weight"] *= 1.0001


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_experts, "experts.1.c_fc.weight' is not base plus update"),
        (transpose, "h.0.attn.c_proj.weight' is not base plus update"),
        (flip_a_bit, "wte.weight' differs from the base's"),
        (flip_the_sign_of_zero, "ln_1.bias' differs from the base's"),
        (a_nan, "experts.1.c_fc.weight' is not base plus update"),
        (another_router, "gate.weight' is not the adapter's trained weight"),
        (lambda state: state.pop(EXPERT), "experts.1.c_fc.weight"),
        (lambda state: state.update({EXPERT: state[EXPERT].bfloat16()}), "is BF16, not the dtype asked for"),
    ],
)
def test_damage_is_found(damage: Any, message: str, tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(tiny_base, adapter, merged, check=False)
    reproved(tiny_base, adapter, merged)
    rewrite(merged, damage)
    with pytest.raises(CheckpointError, match=message):
        reproved(tiny_base, adapter, merged)


@pytest.mark.parametrize("times", [0, 2])
def test_an_update_applied_twice_or_not_at_all_is_found(
    times: int, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merge(tiny_base, adapter, merged, check=False)
    base = load_file(tiny_base / "model.safetensors")[EXPERT]
    rewrite(merged, lambda state: state.update({EXPERT: base + times * (state[EXPERT] - base)}))
    with pytest.raises(CheckpointError, match=r"experts\.1\.c_fc\.weight' is not base plus update"):
        reproved(tiny_base, adapter, merged)


@pytest.mark.parametrize(
    ("name", "what"), [("transformer.wte.weight", "differs from the base's"), (EXPERT, "differs from what was written")]
)
def test_one_wrong_byte_on_disk_is_found(
    name: str, what: str, tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte may be anywhere, also in a weight or a row that is not recomputed."""
    module = import_module("lola_ft.merging.merge")
    right = module.prove

    def lose_a_byte(base: Any, stored: Any, folder: Path, *arguments: Any) -> Any:
        entry = next(entry for entry in read_header(folder / "model.safetensors") if entry.name == name)
        with (folder / "model.safetensors").open("rb+") as file:
            file.seek(entry.start + entry.num_bytes - 4)  # the lowest bits of the last value
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        return right(base, stored, folder, *arguments)

    monkeypatch.setattr(module, "prove", lose_a_byte)
    with pytest.raises(CheckpointError, match=f"'{name}' {what}"):
        merge(tiny_base, adapter, tmp_path / "merged", check="weights")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_expert_read_from_the_wrong_slice_is_found(
    tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B read as expert-slowest has the right shape, and every tensor is applied once."""
    module = import_module("lola_ft.merging.deltas")
    monkeypatch.setattr(module, "split_b", lambda b, experts: b.reshape(len(b), experts, -1).permute(1, 0, 2))
    with pytest.raises(CheckpointError, match=r"experts\.\d\.c_\w+\.weight' is not base plus update"):
        merge(tiny_base, adapter, tmp_path / "merged", check="weights")


def test_a_key_that_belongs_to_no_weight_is_an_error(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(tiny_base, adapter, tmp_path / "merged", check=False)
    base, stored = CheckpointBase.open(BaseCheckpoint.open(tiny_base), "base"), read_adapter(adapter)
    extra = next(iter(stored.entries.values()))
    stored = replace(stored, entries=stored.entries | {"base_model.model.lost.lora_A.weight": extra})
    with pytest.raises(Exception, match="lost"):
        prove(base, stored, tmp_path / "merged", None, crc_of(tmp_path / "merged"))


# Parts of the proof


@pytest.mark.parametrize(
    ("name", "held", "targets", "found"),
    [
        ("t.h.0.mlp.c_fc.weight", ["t.h.0.mlp.c_fc"], [], "t.h.0.mlp.c_fc"),
        ("t.h.0.mlp.c_fc.bias", ["t.h.0.mlp.c_fc"], [], None),
        ("t.h.1.moe.experts.3.c_fc.weight", ["t.h.1.moe.experts.3.c_fc"], [], "t.h.1.moe.experts.3.c_fc"),
        ("t.h.1.moe.experts.3.c_fc.weight", ["t.h.1.moe.experts.2.c_fc"], [], None),
        (
            "t.h.1.moe.experts.3.c_fc.weight",
            ["t.h.1.moe.experts", "t.h.1.moe.experts.base_layer"],
            ["experts.up_proj", "experts.down_proj"],
            "t.h.1.moe.experts.base_layer",
        ),
        (
            "t.h.1.moe.experts.3.c_proj.weight",
            ["t.h.1.moe.experts", "t.h.1.moe.experts.base_layer"],
            ["experts.up_proj", "experts.down_proj"],
            "t.h.1.moe.experts",
        ),
        ("t.h.1.moe.experts.3.c_fc.weight", ["t.h.1.moe.experts"], ["experts.up_proj"], "t.h.1.moe.experts"),
        ("t.h.1.moe.experts.3.c_proj.weight", ["t.h.1.moe.experts"], ["experts.up_proj"], None),
    ],
)
def test_factor_keys_are_found_by_name(name: str, held: list[str], targets: list[str], found: str | None) -> None:
    keys = {f"base_model.model.{module}.lora_{factor}.weight" for module in held for factor in "AB"}
    expected = [f"base_model.model.{found}.lora_{factor}.weight" for factor in "AB"] if found else []
    assert factor_keys(name, keys, {"target_parameters": targets}, LOLA) == expected


def test_checksums_are_those_of_the_written_bytes(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = CheckpointBase.open(BaseCheckpoint.open(tiny_base), "base")
    written = write_weights(base, Deltas(read_adapter(adapter), base), tmp_path, torch.bfloat16, checksums=True)
    assert written.checksums == crc_of(tmp_path)
    assert _Sink(base, tmp_path, None, checksums=False).sums == {}
