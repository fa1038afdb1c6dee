"""Activations as planned against what autograd saves in a forward pass of the adapted model, in every family."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lola_ft.adapters import AdapterSettings
from lola_ft.families import BLOOM, GPT2, LOLA
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.products import GroupedMatmuls
from lola_ft.model import experts, packed
from lola_ft.planning.saved_for_backward import activations, kept_by_activation
from tests.grids import slow_but
from tests.planning.conftest import FAMILIES, Batch, adapted, job_of, make

# The loss keeps its divisor, and a mask that is a token shorter per row. On a CPU the experts' rows are padded to
# multiples of 32, and how many these are depends on the router.
TOLERANCE = {"lola": 0.05, "gpt2": 0.005, "bloom": 0.005}

BY_TYPE = {"lola": LOLA, "gpt2": GPT2, "bloom": BLOOM}
SETTINGS: dict[str, dict[str, Any]] = {
    "both": {"attention_rank": 4, "mlp_rank": 8},
    "attention": {"attention_rank": 64},
    "mlp": {"mlp_rank": 3, "dropout": 0.1, "rslora": True},
    "norms": {"attention_rank": 4, "tune_norms": True},
    "biases": {"tune_biases": True},
    "dora": {"attention_rank": 4, "mlp_rank": 8, "dora": True, "dropout": 0.1},
}
BATCHES = {
    "packed": Batch(2, 64),
    "padded": Batch(4, 60, packing=False),
    "one row": Batch(1, 100, packing=False),
    "checkpointed": Batch(4, 60, packing=False, checkpointing=True),
    "packed, checkpointed": Batch(2, 64, checkpointing=True),
}
FORMATS = [("nf4", "float32"), (None, "float32"), ("nf4", "bfloat16"), (None, "bfloat16")]
# Every kind of training in every format on one batch; every batch with plain LoRA in two formats.
GRID = [
    *(("padded", name, *form) for name in SETTINGS for form in FORMATS),
    *((batch, "both", *form) for batch in BATCHES if batch != "padded" for form in (FORMATS[0], FORMATS[-1])),
]
CASES = [
    (family, *case, dropout)
    for family in FAMILIES
    for case in GRID
    if BY_TYPE[family].packs or not BATCHES[case[0]].packing
    for dropout in (False, True)
]
# Fast: each kind of training, each batch, each format and the base's own dropout, once per family.
FAST_CASES = [
    (*case, dropout)
    for *case, dropout in CASES
    if (tuple(case[3:]) == FORMATS[0] and not dropout)
    or (case[1:3] == ["padded", "both"] and tuple(case[3:]) != FORMATS[0] and dropout)
]


@pytest.mark.parametrize(
    ("family", "batch_name", "name", "quantization", "dtype", "dropout"), slow_but(FAST_CASES, CASES)
)
def test_saved_tensors_are_as_planned(
    family: str,
    batch_name: str,
    name: str,
    quantization: str | None,
    dtype: str,
    dropout: bool,
    odd_bases: Callable[..., Path],
    saved_bytes: Callable[[Any, Batch, bool], int],
) -> None:
    batch, settings = BATCHES[batch_name], AdapterSettings(**SETTINGS[name])
    model = adapted(odd_bases(family, dropout), quantization, dtype, settings)
    planned = activations(job_of(model.config, settings, quantization, dtype, batch)).saved
    assert planned == pytest.approx(saved_bytes(model, batch, dtype == "bfloat16"), rel=TOLERANCE[family])


ALL = {"attention_rank": 4, "mlp_rank": 8, "expert_rank": 4}
EXPERTS: dict[str, tuple[str | None, str, dict[str, Any], Batch, bool]] = {
    "packed": ("nf4", "float32", ALL, Batch(), False),
    "long": ("nf4", "float32", ALL, Batch(6, 64), False),
    "padded, LoRA dropout": ("nf4", "float32", {**ALL, "dropout": 0.1}, Batch(packing=False), False),
    "one row": (None, "float32", {"mlp_rank": 16}, Batch(1, 128, packing=False), False),
    "dense": (None, "float32", ALL, Batch(), False),
    "experts alone": ("nf4", "float32", {"expert_rank": 16}, Batch(), False),
    "some experts": ("nf4", "float32", {"expert_rank": 8, "selection": ((0, 2), ())}, Batch(), False),
    "no experts": (None, "float32", {"attention_rank": 32}, Batch(4, 32, packing=False), False),
    "every dropout": ("nf4", "float32", {**ALL, "dropout": 0.1}, Batch(), True),
    "router and norms": (
        "nf4",
        "float32",
        {"attention_rank": 4, "tune_router": True, "tune_norms": True},
        Batch(),
        False,
    ),
    "router LoRA": (None, "float32", {"router_rank": 4, "dropout": 0.1}, Batch(), False),
    "biases": ("nf4", "float32", {"expert_rank": 4, "tune_biases": True}, Batch(), False),
    "bfloat16": ("nf4", "bfloat16", {**ALL, "dropout": 0.1}, Batch(), False),
    "dense bfloat16": (None, "bfloat16", ALL, Batch(packing=False), False),
    "checkpointing": ("nf4", "float32", ALL, Batch(checkpointing=True), False),
    "checkpointing, every dropout": ("nf4", "float32", {**ALL, "dropout": 0.1}, Batch(4, 64, False, True), True),
}


FAST_EXPERTS = ("packed", "dense", "some experts", "every dropout", "router and norms", "bfloat16", "checkpointing")


@pytest.mark.parametrize("name", slow_but(FAST_EXPERTS, EXPERTS))
def test_saved_tensors_of_experts_and_routers_are_as_planned(
    name: str, odd_bases: Callable[..., Path], saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    quantization, dtype, given, batch, dropout = EXPERTS[name]
    settings = AdapterSettings(**given)
    model = adapted(odd_bases("lola", dropout), quantization, dtype, settings)
    planned = activations(job_of(model.config, settings, quantization, dtype, batch)).saved
    assert planned == pytest.approx(saved_bytes(model, batch, dtype == "bfloat16"), rel=TOLERANCE["lola"])


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
    monkeypatch.setitem(packed.TOKENS, "cpu", packed.TOKENS["cuda"])
    batch = Batch(3, 50)
    model = adapted(odd_base, None, "float32", settings)
    job = replace(job_of(model.config, settings, None, "float32", batch), device="cuda")
    loss_mask = 3 * 50 - 1 + 8  # the labels' mask and the divisor
    assert saved_bytes(model, batch, False) == activations(job).saved - (3 * 50 + 64 * 4) + loss_mask


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputed_layer_saves_what_it_saves_without_checkpointing(
    family: str, odd_bases: Callable[..., Path], saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    """LOLA's layers are of two kinds, of which the larger counts."""
    groups = ALL if family == "lola" else SETTINGS["both"]
    settings, batch = AdapterSettings(**groups), Batch(3, 40, packing=False)
    whole = {}
    for layers in (2, 4) if family == "lola" else (2, 3):
        model = adapted(odd_bases(family), "nf4", "float32", settings)
        model.get_base_model().transformer.h = model.get_base_model().transformer.h[:layers]
        whole[layers] = saved_bytes(model, batch, False)
    job = job_of(model.config, settings, "nf4", "float32", replace(batch, checkpointing=True))
    planned = activations(job).recomputed + job.tokens * job.architecture.sizes.hidden * 4
    if family == "lola":
        assert 0.48 * (whole[4] - whole[2]) < planned < whole[4] - whole[2]
    else:
        assert planned == whole[3] - whole[2]


@pytest.mark.parametrize(
    "activation",
    slow_but(["gelu", "relu"], ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"]),
)
def test_gpt2s_of_any_activation_are_planned(
    activation: str, tmp_path: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    base, settings = (
        make(tmp_path / "base", "gpt2", activation_function=activation),
        AdapterSettings(**SETTINGS["both"]),
    )
    model = adapted(base, "nf4", "float32", settings)
    planned = activations(job_of(model.config, settings, "nf4", "float32", Batch())).saved
    assert planned == pytest.approx(saved_bytes(model, Batch(), False), rel=TOLERANCE["gpt2"])
    assert kept_by_activation("gelu_new") == 4
