"""The two layouts hold the same numbers, bit by bit, and neither drops or confuses a tensor without an error."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lola_ft.adapters.layouts import LAYOUTS, detect_layout, from_state, to_state
from lola_ft.adapters.on_disk import config_for, read_adapter, write_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.families import architecture_of
from tests.tiny import TINY, tiny_config

E = 4
GROUPS: dict[str, dict[str, Any]] = {
    "attention": {"c_attn": (4, 8.0), "attn_c_proj": (3, 8.0)},
    "mlp": {"mlp_up": (5, 2.5), "mlp_down": (6, 8.0)},
    "up": {"up": (2, 6.0)},
    "down": {"down": (7, 3.0)},
    "router": {"router": True},
}
MIXES = [mix for size in range(1, 6) for mix in itertools.combinations(GROUPS, size)]
assert len(MIXES) == 31

State = tuple[dict[str, Tensor], dict[str, Any]]


def stored(weights: AdapterWeights, layout: str) -> State:
    return to_state(weights, layout), config_for(weights, layout)


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_every_mix_of_groups_survives_both_layouts(
    mix: tuple[str, ...],
    make_weights: Callable[..., AdapterWeights],
    same: Callable[[AdapterWeights, AdapterWeights], None],
    tmp_path: Path,
) -> None:
    weights = make_weights(**{key: value for group in mix for key, value in GROUPS[group].items()})
    current, states = weights, []
    for step, layout in enumerate(("peft", "per_expert", "peft", "per_expert")):
        folder = write_adapter(current, tmp_path / str(step), layout)
        current = read_adapter(folder).weights(TINY)
        same(current, weights)
        states.append(load_file(folder / "adapter_model.safetensors"))
    for first, second in ((states[0], states[2]), (states[1], states[3])):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_stack_is_expert_slowest_in_a_and_expert_fastest_in_b(make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(up=(3, 8.0))
    state = to_state(weights, "peft")
    a = state["base_model.model.transformer.h.3.moe.experts.lora_A.weight"]
    b = state["base_model.model.transformer.h.3.moe.experts.lora_B.weight"]
    assert a.shape == (E * 3, 64)
    assert b.shape == (128, 3 * E)
    for e, r in itertools.product(range(E), range(3)):
        pair = weights.pairs[f"transformer.h.3.moe.experts.{e}.c_fc"]
        assert torch.equal(a[e * 3 + r], pair.a[r])
        assert torch.equal(b[:, r * E + e], pair.b[:, r])


@pytest.mark.parametrize(("groups", "nested"), [({"up": (2, 8.0), "down": (3, 8.0)}, True), ({"up": (2, 8.0)}, False)])
def test_wrappers_nest_where_both_projections_have_lora(
    groups: dict[str, Any], nested: bool, make_weights: Callable[..., AdapterWeights]
) -> None:
    state = to_state(make_weights(**groups), "peft")
    up = f"base_model.model.transformer.h.1.moe.experts{'.base_layer' * nested}.lora_A.weight"
    assert state[up].shape == (E * 2, 64)
    assert len(state) == (8 if nested else 4)


def test_the_layout_is_recognised_by_tensor_names(make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(c_attn=(4, 8.0), up=(2, 8.0))
    for layout in LAYOUTS:
        assert detect_layout(to_state(weights, layout)) == layout


def test_every_tensor_of_a_state_is_contiguous_and_named_once(everything: AdapterWeights) -> None:
    for layout, count in (("peft", 34), ("per_expert", 58)):
        state = to_state(everything, layout)
        assert all(tensor.is_contiguous() for tensor in state.values())
        assert len(state) == count
    assert everything.tensor_count() == 58


# Experts and layers left out


def test_experts_left_out_are_zeros_in_a_stack(make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(up=(2, 8.0), down=(3, 8.0), only=lambda module: ".experts.2." in module)
    again = from_state(*stored(weights, "peft"), TINY)
    assert len(weights.pairs) == 4
    assert len(again.pairs) == 4 * E
    for module, pair in again.pairs.items():
        if module in weights.pairs:
            assert torch.equal(pair.a, weights.pairs[module].a)
            assert torch.equal(pair.b, weights.pairs[module].b)
        else:
            assert not again.delta(module).any()


def test_experts_left_out_stay_out_per_expert(
    make_weights: Callable[..., AdapterWeights], same: Callable[[AdapterWeights, AdapterWeights], None]
) -> None:
    weights = make_weights(up=(2, 8.0), only=lambda module: ".experts.2." in module)
    same(from_state(*stored(weights, "per_expert"), TINY), weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_left_out_stay_out(
    layout: str,
    make_weights: Callable[..., AdapterWeights],
    same: Callable[[AdapterWeights, AdapterWeights], None],
) -> None:
    weights = make_weights(
        c_attn=(4, 8.0),
        mlp_up=(3, 8.0),
        up=(2, 8.0),
        down=(3, 8.0),
        router=True,
        only=lambda module: module.startswith(("transformer.h.2.", "transformer.h.3.")),
    )
    same(from_state(*stored(weights, layout), TINY), weights)


# What a layout cannot hold


def test_experts_of_different_rank_fit_per_expert_only(make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(up=(2, 8.0), only=lambda module: ".h.1." in module)
    other = make_weights(up=(3, 8.0))
    weights.pairs["transformer.h.1.moe.experts.1.c_fc"] = other.pairs["transformer.h.1.moe.experts.1.c_fc"]
    assert len(to_state(weights, "per_expert")) == 2 * E
    with pytest.raises(AdapterError, match=r"transformer.h.1.moe.experts.up_proj: its experts differ in rank or alpha"):
        to_state(weights, "peft")


def test_layers_of_different_rank_are_refused_by_name(make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(c_attn=(2, 8.0))
    weights.pairs["transformer.h.2.attn.c_attn"] = make_weights(c_attn=(3, 8.0)).pairs["transformer.h.2.attn.c_attn"]
    for layout in LAYOUTS:
        with pytest.raises(AdapterError, match=r"transformer.h.2.attn.c_attn: its rank or alpha differs"):
            config_for(weights, layout)


def test_one_layer_with_both_projections_and_one_with_only_up_is_refused_in_a_stack(
    make_weights: Callable[..., AdapterWeights],
) -> None:
    """The single `experts.lora_A` would be ambiguous: down_proj's in one layer, up_proj's in another."""
    weights = make_weights(up=(2, 8.0), down=(2, 8.0))
    for e in range(E):
        del weights.pairs[f"transformer.h.3.moe.experts.{e}.c_proj"]
    with pytest.raises(AdapterError, match="only the layout per_expert can hold both"):
        to_state(weights, "peft")
    assert len(to_state(weights, "per_expert")) == 2 * (2 * E + E)


# Tensors that cannot be right


def broken(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """Return the state with keys (by their ending) replaced, or removed if None."""
    result = dict(state)
    for end, tensor in changes.items():
        (key,) = [key for key in state if key.endswith(end)] or [end]
        if tensor is None:
            del result[key]
        else:
            result[key] = tensor
    return result


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"h.0.attn.c_attn.lora_B.weight": None}, r"1 .*transformer\.h\.0\.attn\.c_attn", id="B missing"),
        pytest.param({"h.1.moe.experts.lora_A.weight": None}, r"transformer\.h\.1\.moe\.experts", id="A missing"),
        pytest.param(
            {"base_model.model.transformer.wte.lora_embedding_A": torch.ones(2, 2)}, r"wte.*are one tensor", id="wte"
        ),
        pytest.param({"base_model.model.lm_head.weight": torch.ones(2, 2)}, r"lm_head.*are one tensor", id="lm_head"),
        pytest.param({"base_model.model.transformer.h.0.attn.bias": torch.ones(2)}, r"attn\.bias", id="a buffer"),
        pytest.param(
            {
                f"base_model.model.transformer.h.0.attn.c_attn.{wrapped}bias": torch.ones(192)
                for wrapped in ("", "base_layer.")
            },
            r"1 .*attn\.c_attn\.bias",
            id="a bias twice",
        ),
        pytest.param({"h.0.attn.c_attn.lora_B.weight": torch.ones(7)}, r"attn\.c_attn\.lora_B", id="one-dimensional"),
        pytest.param(
            {"h.0.attn.c_attn.lora_B.weight": torch.ones(192, 5)}, r"c_attn: A has 4 rows and B 5 columns", id="ranks"
        ),
        pytest.param(
            {"transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 64)}, r"transformer\.h\.0\.attn", id="twice"
        ),
        pytest.param(
            {"base_model.model.transformer.h.1.moe.experts.2.c_proj.lora_A.weight": torch.ones(2, 128)},
            r"h\.1\.moe\.experts\.2\.c_proj",
            id="half an expert beside a stack",
        ),
    ],
)
def test_a_tensor_without_a_place_is_named(
    changes: dict[str, Tensor | None], named: str, make_weights: Callable[..., AdapterWeights]
) -> None:
    state, config = stored(make_weights(c_attn=(4, 8.0), up=(2, 8.0), down=(2, 8.0)), "peft")
    if any(key == "transformer.h.0.attn.c_attn.lora_A.weight" for key in changes):
        state |= changes  # in addition to the prefixed one
    else:
        state = broken(state, **changes)
    with pytest.raises(AdapterError, match=named):
        from_state(state, config, TINY)


def test_an_expert_that_is_both_single_and_in_a_stack_is_refused(make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(up=(2, 8.0))
    state, config = stored(weights, "peft")
    both = to_state(weights, "per_expert")
    state |= {key: tensor for key, tensor in both.items() if ".h.3.moe.experts.1." in key}
    with pytest.raises(AdapterError, match=r"h.3.moe.experts.up_proj: expert 1 is in the file twice, in the stack"):
        from_state(state, config, TINY)


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_a_stack_for_another_number_of_experts_is_refused(
    num_experts: int, make_weights: Callable[..., AdapterWeights]
) -> None:
    """A number that divides the rows is refused, too: split into 2, 4 experts of rank 4 look like rank 8."""
    state, config = stored(make_weights(up=(4, 8.0)), "peft")
    with pytest.raises(AdapterError, match=rf"h.1.moe.experts.up_proj: A has 16 rows.*each of {num_experts} experts"):
        from_state(state, config, architecture_of(tiny_config(num_experts=num_experts)))


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_config_without_rank_or_alpha_is_refused(key: str, make_weights: Callable[..., AdapterWeights]) -> None:
    state, config = stored(make_weights(c_attn=(4, 8.0)), "peft")
    with pytest.raises(AdapterError, match=rf"adapter_config.json gives no {key} for transformer.h.0.attn.c_attn"):
        from_state(state, {name: value for name, value in config.items() if name != key}, TINY)


def test_a_lone_stack_without_a_named_projection_is_refused(make_weights: Callable[..., AdapterWeights]) -> None:
    state, config = stored(make_weights(up=(4, 8.0)), "peft")
    for targets in (None, ["experts.up_proj", "experts.down_proj"], ["experts.gate_up_proj"]):
        with pytest.raises(
            AdapterError, match=r"transformer.h.1.moe.experts: target_parameters .* do not name its projection"
        ):
            from_state(state, config | {"target_parameters": targets}, TINY)
