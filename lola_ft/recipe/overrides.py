"""Overrides on the command line (`key=value`), applied to a recipe's data.

A key is a dotted path into the recipe, with indices of list items (`data.sources.0.path`). A value is read as YAML,
so `null`, `8`, `1e-4` and `{rank: 4}` have the same meaning as in the file.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lola_ft.recipe.document import BadYaml, KeyPath, parse_document

EXCLUSIVE = {("train", "max_steps"): ("train", "epochs"), ("train", "epochs"): ("train", "max_steps")}
"""Overriding the first key removes the second one of the file, so that a short trial of a recipe needs one word."""

PLACES = {
    "path": ("hub", "subset", "split", "revision", "streaming"),
    "hub": ("path", "unit", "delimiter", "quoting", "rows_under"),
}
"""In a source, overriding `path` removes the keys of a Hub dataset, and overriding `hub` those of a local file."""


@dataclass
class Overridden:
    """A recipe's data after the overrides."""

    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """The override, as typed, that set the value at each path."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Overrides that could not be applied: the text as typed, and the reason."""


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> Overridden:
    """Apply overrides to a copy of a recipe's data, in their order."""
    result = Overridden(copy.deepcopy(data))
    for override in overrides:
        if problem := _apply(override, result):
            result.problems.append((override, problem))
    return result


def _apply(override: str, result: Overridden) -> str | None:
    """Apply one override; returns the mistake in it, None if it was applied."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        return "expected key=value, such as train.max_steps=20"
    try:
        document = parse_document(text)
    except BadYaml as error:
        return f"the value is {error.message}"
    if document.problems:
        return document.problems[0][2]
    return _put(parts, document.data, override, result)


def _put(parts: list[str], value: Any, override: str, result: Overridden) -> str | None:
    place: Any = result.data
    path: KeyPath = ()
    for part in parts[:-1]:
        step, problem = _step(place, part, path)
        if problem:
            return problem
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
            result.origins[(*path, part)] = override
        place, path = place[step], (*path, step)
    step, problem = _step(place, parts[-1], path)
    if problem:
        return problem
    path = (*path, step)
    if path in EXCLUSIVE and value is not None and EXCLUSIVE[path] not in result.origins:
        place.pop(EXCLUSIVE[path][-1], None)
    if path[:1] == ("data",) and isinstance(place, dict) and value is not None:
        for other in PLACES.get(str(step), ()):
            if (*path[:-1], other) not in result.origins:
                place.pop(other, None)
    place[step] = value
    result.origins[path] = override
    return None


def _step(place: Any, part: str, path: KeyPath) -> tuple[str | int, str | None]:
    """Return the key or list index that `part` names in `place`, and the mistake in it (None if it is right)."""
    name = ".".join(map(str, path)) or "the recipe"
    if isinstance(place, dict):
        return part, None
    if not isinstance(place, list):
        return part, f"{name} is a single value; it has no '{part}'"
    if part.isascii() and part.isdigit() and len(part) < 6 and int(part) < len(place):
        return int(part), None
    return part, f"{name} is a list of {len(place)}; name an item by its number, from 0 to {len(place) - 1}"
