"""The tensors that autograd saves for transformers' mixtures of experts, as planned and as measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.adapters import AdapterSettings
from lola_ft.planning.saved_for_backward import activations
from tests.families.moe import KINDS
from tests.grids import slow_but
from tests.planning.conftest import Batch, adapted, job_of, saved_bytes

__all__ = ["saved_bytes"]

# The router decides about the experts' rows, and rows are padded. Copies of a cast norm are not counted.
TOLERANCE = 0.08
RANKS = {"attention": "attention_rank", "mlp": "mlp_rank", "shared_experts": "shared_rank", "experts": "expert_rank"}
CASES: dict[str, tuple[dict[str, Any], Batch, str | None, str]] = {
    "packed": ({}, Batch(6, 64), "nf4", "float32"),
    "padded, in 16 bit": ({}, Batch(4, 120, packing=False), "nf4", "bfloat16"),
    "checkpointed": ({}, Batch(4, 120, checkpointing=True), "nf4", "bfloat16"),
    "dense, norms": ({"tune_norms": True}, Batch(6, 64), None, "bfloat16"),
    "dropout": ({"dropout": 0.1}, Batch(6, 64), "nf4", "float32"),
    "router tuned": ({"tune_router": True}, Batch(6, 64), "nf4", "bfloat16"),
    "router with LoRA": ({"router_rank": 4}, Batch(6, 64), "nf4", "float32"),
}


@pytest.mark.parametrize("kind", slow_but(["olmoe", "deepseek_v3"], KINDS))
@pytest.mark.parametrize("case", CASES)
def test_saved_tensors_are_as_planned(
    kind: str,
    case: str,
    moe_bases: dict[str, Path],
    saved_bytes: Callable[[Any, Batch, bool], int],
) -> None:
    changes, batch, quantization, dtype = CASES[case]
    settings = AdapterSettings(**{RANKS[group]: 4 for group in KINDS[kind].groups if group in RANKS} | changes)
    model = adapted(moe_bases[kind], quantization, dtype, settings)
    planned = activations(job_of(model.config, settings, quantization, dtype, batch)).saved
    assert planned == pytest.approx(saved_bytes(model, batch, dtype == "bfloat16"), rel=TOLERANCE)
