"""Rules of the objectives that learn from judged answers (dpo, kto): settings they need, and settings they refuse."""

from collections.abc import Iterator
from typing import Any

from lola_ft.recipe.allowed_values import OBJECTIVE_FORMATS, PREFERENCE_LOSSES
from lola_ft.recipe.document import KeyPath

LEAST_MICRO_BATCH = {"kto": 2}
"""Fewest rows of a micro batch by loss type. kto pairs each prompt with another row's answer."""

_NOT_DEFAULTS = (("data", "packing", False), ("adapter", "dropout", 0.0))


def with_defaults(given: Any) -> Any:
    """Return a recipe's data with the defaults of dpo and kto, where those differ from sft's."""
    if not isinstance(given, dict) or given.get("objective") not in OBJECTIVE_FORMATS:
        return given
    for section, key, value in _NOT_DEFAULTS:
        keys = given.get(section, {})
        if isinstance(keys, dict) and key not in keys:
            given = given | {section: keys | {key: value}}
    train, adapter = given.get("train", {}), given.get("adapter")
    if isinstance(train, dict):
        continues = isinstance(adapter, dict) and adapter.get("continue_from") is not None
        first = PREFERENCE_LOSSES[given["objective"]][0]
        reference = {"reference": "adapter" if continues else "base", "reference_pass": "auto"}
        defaults = {"beta": 0.1, "loss_type": first, **reference}
        given = given | {"train": defaults | {key: value for key, value in train.items() if value is not None}}
    return given


def problems(recipe: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield (path, message) of each setting in a valid recipe's data that does not fit the objective."""
    objective, train = recipe["objective"], recipe["train"]
    yield from _formats(recipe["data"], objective)
    if objective not in OBJECTIVE_FORMATS:
        for key in ("beta", "loss_type", "reference", "reference_pass"):
            if train[key] is not None:
                yield ("train", key), "belongs to objective dpo or kto. Remove it, or set `objective`"
        return
    losses = PREFERENCE_LOSSES[objective]
    if train["loss_type"] not in losses:
        yield ("train", "loss_type"), f"objective {objective} has {', '.join(losses)}; got {train['loss_type']!r}"
    least = LEAST_MICRO_BATCH.get(train["loss_type"], 1)
    if train["micro_batch_size"] < least:
        why = "kto pairs each prompt with another row's answer of the same micro batch"
        yield ("train", "micro_batch_size"), f"{why}. Give at least {least}"
    if train["reference"] == "adapter" and recipe["adapter"]["continue_from"] is None:
        yield ("train", "reference"), "there is no adapter to refer to. Set adapter.continue_from, or choose base"
    yield from _without_meaning(recipe, objective)


def _formats(data: dict[str, Any], objective: str) -> Iterator[tuple[KeyPath, str]]:
    for key in ("sources", "validation"):
        for place, source in enumerate(data[key] if isinstance(data[key], list) else []):
            wanted, judged = OBJECTIVE_FORMATS.get(objective), source["format"] in OBJECTIVE_FORMATS.values()
            if wanted and source["format"] != wanted:
                yield ("data", key, place, "format"), f"objective {objective} learns from format {wanted}"
            elif not wanted and judged:
                yield (
                    ("data", key, place, "format"),
                    "judged answers need another objective. Set `objective: dpo` for preference, `objective: kto` for "
                    "unpaired_preference",
                )


def _without_meaning(recipe: dict[str, Any], objective: str) -> Iterator[tuple[KeyPath, str]]:
    adapter = recipe["adapter"]
    if recipe["data"]["packing"]:
        yield ("data", "packing"), f"{objective} compares whole answers, which need a row each. Set it to false"
    for place in ((), ("attention",), ("mlp",), ("shared_experts",), ("experts",)):
        section = adapter[place[0]] if place else adapter
        if section and section["dropout"]:
            yield (
                ("adapter", *place, "dropout"),
                f"{objective} compares the model with its reference, and dropout would add noise. Set it to 0",
            )
    if adapter["init"] == "loftq" and adapter["continue_from"] is None:
        yield (
            ("adapter", "init"),
            f"{objective} keeps the model near its start, the base without an adapter, and loftq starts elsewhere. "
            "Choose default or gaussian",
        )
    if recipe["guards"]["router_collapse"] == "stop":
        yield ("guards", "router_collapse"), f"{objective} does not measure the router's load. Choose warn or off"
    for key in ("aux_loss", "z_loss"):
        if recipe["router"][key]:
            yield ("router", key), f"{objective} does not add the router's losses to its own loss. Remove it"
