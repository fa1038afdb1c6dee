"""The table's defaults are a usual modern decoder: a Llama with no trait of its own is planned as it computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lola_ft.adapters import AdapterSettings
from lola_ft.families import FAMILIES, Family, Place, Sizes
from lola_ft.planning.saved_for_backward import activations
from lola_ft.planning.workspace import backward_work
from tests.planning.conftest import Batch, adapted, checkpointed, job_of, make_batch
from tests.planning.test_planning_workspace import peak_of_backward

# The loss keeps its divisor; the tables of rotary positions are no activations.
TOLERANCE = 0.01
WORK_TOLERANCE = 0.15


def sizes(config: Any) -> Sizes:
    heads, positions = config.num_attention_heads, config.max_position_embeddings
    widths = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    return Sizes(*widths, heads, positions, activation=config.hidden_act)


def places(config: Any) -> dict[str, Place]:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "input_layernorm": ((hidden,), "norms"),
        **{f"self_attn.{x}_proj": ((hidden, hidden), "attention") for x in "qkvo"},
        "post_attention_layernorm": ((hidden,), "norms"),
        **{f"mlp.{x}_proj": ((inner, hidden), "mlp") for x in ("gate", "up")},
        "mlp.down_proj": ((hidden, inner), "mlp"),
    }
    embeddings = {
        name: Place(name, (config.vocab_size, hidden), group)
        for name, group in (("model.embed_tokens.weight", "embeddings"), ("lm_head.weight", "head"))
    }
    layers = {
        f"model.layers.{layer}.{name}.weight": Place(f"model.layers.{layer}.{name}.weight", shape, group, layer)
        for layer in range(config.num_hidden_layers)
        for name, (shape, group) in shapes.items()
    }
    return embeddings | layers | {"model.norm.weight": Place("model.norm.weight", (hidden,), "norms")}


LLAMA = Family(
    model_type="llama",
    title="Llama",
    heads={"causal_lm": "transformers:LlamaForCausalLM"},
    backbone="model",
    positions="rotary",
    packs=True,
    targets={
        "attention": tuple(f"self_attn.{x}_proj" for x in "qkvo"),
        "mlp": tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    },
    size_keys=(),
    config_keys=lambda _sizes: {},
    embeddings=("model.embed_tokens.weight", "lm_head.weight"),
    sizes=sizes,
    places=places,
)


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny random Llama, while its family is listed."""
    monkeypatch.setitem(FAMILIES, "llama", LLAMA)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=256, **shape)).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


SETTINGS = {
    "both": {"attention_rank": 4, "mlp_rank": 8},
    "dropout": {"attention_rank": 4, "mlp_rank": 8, "dropout": 0.1},
    "norms": {"mlp_rank": 4, "tune_norms": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_saved_tensors_are_as_planned(
    name: str, checkpointing: bool, dtype: str, llama: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    settings, batch = AdapterSettings(**SETTINGS[name]), Batch(3, 80, packing=False, checkpointing=checkpointing)
    model = adapted(llama, None, dtype, settings)
    job = job_of(model.config, settings, None, dtype, batch)
    planned = activations(job).saved
    assert planned == pytest.approx(saved_bytes(model, batch, dtype == "bfloat16"), rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_the_backward_pass_is_as_planned(checkpointing: bool, llama: Path) -> None:
    settings, batch = AdapterSettings(**SETTINGS["both"]), Batch(4, 128, packing=False, checkpointing=checkpointing)
    model = adapted(llama, None, "float32", settings)
    if checkpointing:
        checkpointed(model)
    job = job_of(model.config, settings, None, "float32", batch)
    kept = activations(job)
    planned = kept.saved + kept.held + kept.recomputed + backward_work(job)
    assert planned == pytest.approx(peak_of_backward(model, make_batch(batch)), rel=WORK_TOLERANCE)
