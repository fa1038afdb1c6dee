"""Activations as planned against what autograd saves in a forward pass of the adapted model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lola_ft.adapters import AdapterSettings
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.products import GroupedMatmuls
from lola_ft.model import experts
from lola_ft.planning.activations import activations
from tests.planning.conftest import Batch, adapted, job_of

# On a CPU the experts' rows are padded to multiples of 32, and how many that are depends on the router.
TOLERANCE = 0.05

ALL = {"attention_rank": 4, "mlp_rank": 8, "expert_rank": 4}
CASES: dict[str, tuple[str | None, str, dict[str, Any], Batch, float]] = {
    "packed": ("nf4", "float32", ALL, Batch(), 0.0),
    "long": ("nf4", "float32", ALL, Batch(3, 120), 0.0),
    "padded, LoRA dropout": ("nf4", "float32", {**ALL, "dropout": 0.1}, Batch(packing=False), 0.0),
    "one row": (None, "float32", {"mlp_rank": 16}, Batch(1, 128, packing=False), 0.0),
    "dense": (None, "float32", ALL, Batch(), 0.0),
    "experts alone": ("nf4", "float32", {"expert_rank": 16}, Batch(), 0.0),
    "some experts": ("nf4", "float32", {"expert_rank": 8, "selection": ((0, 2), ())}, Batch(), 0.0),
    "no experts": (None, "float32", {"attention_rank": 32}, Batch(4, 32, packing=False), 0.0),
    "every dropout": ("nf4", "float32", {**ALL, "dropout": 0.1}, Batch(), 0.1),
    "router and norms": (
        "nf4",
        "float32",
        {"attention_rank": 4, "tune_router": True, "tune_norms": True},
        Batch(),
        0.0,
    ),
    "router LoRA": (None, "float32", {"router_rank": 4, "dropout": 0.1}, Batch(), 0.0),
    "biases": ("nf4", "float32", {"expert_rank": 4, "tune_biases": True}, Batch(), 0.0),
    "dora": ("nf4", "float32", {"attention_rank": 4, "mlp_rank": 8, "dora": True, "dropout": 0.1}, Batch(), 0.0),
    "dense dora": (None, "float32", {"attention_rank": 4, "mlp_rank": 8, "dora": True}, Batch(), 0.0),
    "bfloat16": ("nf4", "bfloat16", {**ALL, "dropout": 0.1}, Batch(), 0.0),
    "dense bfloat16": (None, "bfloat16", ALL, Batch(packing=False), 0.0),
    "checkpointing": ("nf4", "float32", ALL, Batch(checkpointing=True), 0.0),
    "checkpointing, every dropout": ("nf4", "float32", {**ALL, "dropout": 0.1}, Batch(4, 64, False, True), 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_are_as_planned(
    name: str, odd_base: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    quantization, dtype, given, batch, dropout = CASES[name]
    settings = AdapterSettings(**given)
    model = adapted(odd_base, quantization, dtype, settings, dropout)
    job = job_of(model.config, settings, quantization, dtype, batch)
    planned = activations(job).saved
    real = saved_bytes(model, batch, dtype == "bfloat16")
    assert planned == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize("selection", [None, ((0, 2), (1,))])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gpus_way_with_the_experts_is_as_planned_to_the_byte(
    selection: Any,
    dropout: float,
    odd_base: Path,
    saved_bytes: Callable[[Any, Batch, bool], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its code runs on a CPU, too; in float32 and without other dropout, the rest of a layer saves the same on both."""
    given = {"attention_rank": 4, "mlp_rank": 8, "expert_rank": 12, "selection": selection}
    settings = AdapterSettings(**given, dropouts={"experts": dropout})
    monkeypatch.setattr(experts, "run_experts", partial(run_experts, products=GroupedMatmuls()))
    batch = Batch(3, 50)
    model = adapted(odd_base, None, "float32", settings)
    job = replace(job_of(model.config, settings, None, "float32", batch), device="cuda")
    loss_mask = 3 * 50 - 1 + 8  # the labels' mask and the divisor
    assert saved_bytes(model, batch, False) == activations(job).saved - (3 * 50 + 64 * 4) + loss_mask


def test_a_recomputed_layer_saves_what_it_saves_without_checkpointing(
    odd_base: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    settings = AdapterSettings(**ALL)
    whole = {}
    for layers in (2, 4):
        batch = Batch()
        model = adapted(odd_base, "nf4", "float32", settings)
        model.get_base_model().transformer.h = model.get_base_model().transformer.h[:layers]
        whole[layers] = saved_bytes(model, batch, False)
    pair = whole[4] - whole[2]  # a dense layer and one with experts
    job = job_of(model.config, settings, "nf4", "float32", Batch(checkpointing=True))
    block_input = job.tokens * job.config.n_embd * 4
    assert 0.48 * pair < activations(job).recomputed + block_input < pair
