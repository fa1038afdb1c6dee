"""The table of families: complete, the only place with their tensors' names, and printed by `lola-ft families`."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from lola_ft.errors import CheckpointError, UserError
from lola_ft.families import FAMILIES, LOLA, Family, Sizes, architecture_of, find_family
from tests.conftest import Outcome
from tests.families.moe import COMMON, KINDS
from tests.tiny import TINY

PACKAGE = Path(__file__).parents[2] / "lola_ft"
NAMES_ALLOWED = ("families", "model", "standalone")  # the native model and the exported code are LOLA's own
SMALL: dict[str, dict[str, Any]] = {
    "lola_v1": {"n_layer": 2},
    "gpt2": {"n_layer": 2},
    "bloom": {"n_layer": 2, "hidden_size": 64},
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def small_config(family: Family) -> Any:
    sizes = COMMON | KINDS[family.model_type].sizes if family.model_type in KINDS else {"num_hidden_layers": 2}
    return CONFIG_MAPPING[family.model_type](**SMALL.get(family.model_type, sizes))


def test_every_parameter_of_the_model_has_a_place_of_its_size(family: Family) -> None:
    config = small_config(family)
    with torch.device("meta"):
        model = family.model_class()(config)
    places = architecture_of(config).places.values()
    held = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()}
    assert held <= {place.parameter for place in places} <= held | buffers
    for name, parameter in model.named_parameters():
        own = [torch.Size(place.shape).numel() for place in places if place.parameter == name]
        assert sum(own) == parameter.numel(), name


def test_targets_norms_and_biases_are_those_of_the_places(family: Family) -> None:
    architecture = architecture_of(small_config(family))
    for name, place in architecture.places.items():
        lora = name.endswith(".weight") and place.group in family.lora_groups and len(place.shape) == 2
        target = family.target_of(name.removesuffix(".weight"), "peft")
        assert (target is not None) == lora, name
        assert not lora or str(target).removesuffix(".weight") in family.targets.get(place.group, family.expert_targets)
    assert bool(architecture.norm_modules) == ("norms" in family.fully)
    assert not architecture.bias_names or "biases" in family.fully  # the config decides about biases
    assert bool(family.experts) == bool(family.routing) == bool(architecture.sizes.moe_layers)


def test_a_config_of_given_sizes_has_these_sizes(family: Family) -> None:
    sizes = Sizes(
        vocab=320, hidden=64, inner=256, layers=3, heads=4, positions=96, num_experts=8, expert_inner=24, top_k=1
    )
    if family is LOLA or (family.experts and "mlp" not in family.targets):
        sizes = replace(sizes, expert_inner=256)  # one key gives both widths
    found = family.sizes(CONFIG_MAPPING[family.model_type](**family.config_keys(sizes)))
    own: dict[str, Any] = {"moe_layers": found.moe_layers, "activation": found.activation}
    assert found == replace(
        sizes, **own | ({} if family.experts else {"num_experts": 0, "expert_inner": 0, "top_k": 0})
    )


def words_of(family: Family) -> set[str]:
    """Return the model type, and parts of tensor names that are not English (`c_attn`, `w1`, `input_layernorm`)."""
    parts = {part for name in architecture_of(small_config(family)).places for part in name.split(".")}
    odd = {part for part in parts if re.search(r"_|[a-z]\d", part)} | parts & {"wte", "wpe"}
    field_words = {"gate_proj", "up_proj", "down_proj", "shared_experts", "shared_expert", "self_attn"}
    return odd - field_words | {family.model_type}


def test_tensor_names_of_a_family_are_only_in_its_file() -> None:
    words = set[str]().union(*map(words_of, FAMILIES.values()))
    assert {"c_attn", "wte", "query_key_value", "gpt2", "lola_v1"} <= words
    pattern = re.compile(rf"(?<!\w)({'|'.join(sorted(words))})(?!\w)")
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in NAMES_ALLOWED:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.replace("dice-research/lola_v1", "")  # the base's name on the Hub
            wrong += [f"{path.relative_to(PACKAGE)}:{number}: {match[0]}" for match in pattern.finditer(text)]
    assert wrong == []


def test_a_missing_group_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(UserError) as caught:
        TINY.require({"adapter.shared_experts": "shared_experts", "adapter.attention": "attention"})
    assert str(caught.value) == (
        "adapter.shared_experts: the base is of the family LOLA (lola_v1), which has no shared_experts. It has "
        "attention, mlp, experts, router, norms, biases. Leave it out, or choose another base."
    )


def test_an_unknown_model_type_lists_the_families() -> None:
    with pytest.raises(CheckpointError, match=r"model_type is 't5'.*GPT-2 \(gpt2\), BLOOM \(bloom\)"):
        find_family("t5")


def test_the_verb_lists_every_family(verb: Callable[..., Outcome]) -> None:
    text, parsed = verb("families").out, json.loads(verb("families", "--json").out)
    assert parsed.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        assert f"{family.title} (model_type {name})" in text
        assert parsed[name]["lora"] == list(family.lora_groups)
    assert parsed["lola_v1"]["trained_fully"] == ["router", "norms", "biases"]
    assert parsed["bloom"]["packing"] is False
