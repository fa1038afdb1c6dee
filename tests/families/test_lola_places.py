"""Places in the native model of the Hub's tensors: transformers' conversion and LOLA's places agree."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lola_ft.families import LOLA, Place, architecture_of
from lola_ft.model import LolaForCausalLM

D, F = 2048, 8192


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.wte.weight", Place("transformer.wte.weight", (100_096, D), "embeddings")),
        ("transformer.h.0.ln_1.bias", Place("transformer.h.0.ln_1.bias", (D,), "norms", 0)),
        (
            "transformer.h.0.attn.c_proj.weight",
            Place("transformer.h.0.attn.c_proj.weight", (D, D), "attention", 0, in_by_out=True),
        ),
        ("transformer.h.0.attn.c_proj.bias", Place("transformer.h.0.attn.c_proj.bias", (D,), "attention", 0)),
        ("transformer.h.2.mlp.c_fc.weight", Place("transformer.h.2.mlp.c_fc.weight", (D, F), "mlp", 2, in_by_out=True)),
        ("transformer.h.1.moe.gate.weight", Place("transformer.h.1.moe.gate.weight", (16, D), "router", 1)),
        (
            "transformer.h.1.moe.experts.11.c_fc.weight",
            Place("transformer.h.1.moe.experts.up_proj", (D, F), "experts", 1, 11, in_by_out=True),
        ),
        (
            "transformer.h.1.moe.experts.0.c_proj.bias",
            Place("transformer.h.1.moe.experts.down_proj_bias", (D,), "experts", 1, 0),
        ),
    ],
)
def test_hub_tensors_have_their_places_in_memory(name: str, place: Place) -> None:
    assert architecture_of(LolaForCausalLM.config_class()).places[name] == place


def test_legacy_tensors_are_recognised() -> None:
    assert all(LOLA.is_ignored(name) for name in ("transformer.h.0.attn.bias", "transformer.h.9.attn.masked_bias"))
    assert not any(map(LOLA.is_ignored, architecture_of(LolaForCausalLM.config_class()).places))


def test_the_published_layout_has_as_many_tensors_and_parameters_as_on_the_hub() -> None:
    shapes = [place.shape for place in architecture_of(LolaForCausalLM.config_class()).places.values()]
    assert len(shapes) == 1024
    assert sum(torch.Size(shape).numel() for shape in shapes) == 7_459_827_712


def test_transformers_conversion_agrees_with_the_places(
    make_model: Callable[..., LolaForCausalLM], tmp_path: Path
) -> None:
    """The model has twelve experts, so that a text order (0, 1, 10, 11, 2, ...) would be found."""
    model = make_model(num_experts=12, n_layer=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    places = architecture_of(model.config).places
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: place.shape for name, place in places.items()
    }
    for one in (model, loaded):
        parameters = dict(one.named_parameters())
        for name, tensor in tensors.items():
            place = places[name]
            expected = tensor.t() if place.transposed else tensor
            actual = parameters[place.parameter]
            actual = actual if place.expert is None else actual[place.expert]
            assert torch.equal(actual, expected), name
