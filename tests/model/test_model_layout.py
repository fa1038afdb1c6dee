"""Where each tensor of the Hub's layout lives in the native model: transformers' conversion and `place_of` agree."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lola_ft.model import LolaForCausalLM
from lola_ft.model.hub_checkpoint import expected_shapes
from lola_ft.model.layout import Place, is_ignored, place_of


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("transformer.wte.weight", Place("transformer.wte.weight")),
        ("transformer.h.0.ln_1.bias", Place("transformer.h.0.ln_1.bias")),
        ("transformer.h.0.attn.c_proj.weight", Place("transformer.h.0.attn.c_proj.weight", transposed=True)),
        ("transformer.h.0.attn.c_proj.bias", Place("transformer.h.0.attn.c_proj.bias")),
        ("transformer.h.2.mlp.c_fc.weight", Place("transformer.h.2.mlp.c_fc.weight", transposed=True)),
        ("transformer.h.1.moe.gate.weight", Place("transformer.h.1.moe.gate.weight")),
        ("transformer.h.1.moe.experts.11.c_fc.weight", Place("transformer.h.1.moe.experts.up_proj", 11)),
        ("transformer.h.1.moe.experts.0.c_proj.bias", Place("transformer.h.1.moe.experts.down_proj_bias", 0)),
    ],
)
def test_place_of(key: str, place: Place) -> None:
    assert place_of(key) == place


def test_legacy_tensors_are_told_from_weights() -> None:
    assert all(is_ignored(key) for key in ("transformer.h.0.attn.bias", "transformer.h.9.attn.masked_bias"))
    assert is_ignored("lm_head.weight")
    assert not any(is_ignored(key) for key in expected_shapes(LolaForCausalLM.config_class()))


def test_the_published_layout_has_as_many_tensors_and_parameters_as_on_the_hub() -> None:
    shapes = expected_shapes(LolaForCausalLM.config_class())
    assert len(shapes) == 1024
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 7_459_827_712


def test_transformers_conversion_agrees_with_place_of(
    make_model: Callable[..., LolaForCausalLM], tmp_path: Path
) -> None:
    """With twelve experts, so that an order by text (0, 1, 10, 11, 2, ...) would show."""
    model = make_model(num_experts=12, n_layer=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(model.config)
    for one in (model, loaded):
        parameters = dict(one.named_parameters())
        for name, tensor in tensors.items():
            place = place_of(name)
            expected = tensor.t() if place.transposed else tensor
            actual = parameters[place.parameter]
            actual = actual if place.expert_id is None else actual[place.expert_id]
            assert torch.equal(actual, expected), name
