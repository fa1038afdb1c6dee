"""The schema's keys by their dotted names."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args, get_origin

from lola_ft.recipe.document import KeyPath
from lola_ft.recipe.schema import Recipe, Section


@cache
def all_keys() -> tuple[str, ...]:
    """Every key of a recipe, such as `train.max_steps`; items of lists go without their number."""
    return tuple(_keys(Recipe, ""))


def section_at(keys: Sequence[str]) -> type[Section] | None:
    """The section's class behind a path of keys, None where the path leads to no section."""
    section: type[Section] | None = Recipe
    for key in keys:
        info = section.model_fields.get(key) if section else None
        section = _inner_section(info.annotation) if info else None
    return section


def own_key(path: KeyPath) -> tuple[type[Section], KeyPath] | None:
    """The innermost section on a path and the path of its key: `data.sources.0.fields` of `data.sources.0.fields.text`;
    None where the path leads to none."""
    for end in range(len(path), 0, -1):
        section = section_at([part for part in path[: end - 1] if isinstance(part, str)])
        if section and path[end - 1] in section.model_fields:
            return section, path[:end]
    return None


def describe_key(path: Sequence[str | int]) -> str:
    """The schema's one-line description of a key, "" for one it does not know."""
    *parents, key = [part for part in path if isinstance(part, str)]
    section = section_at(parents)
    info = section.model_fields.get(key) if section else None
    return (info.description or "") if info else ""


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        if inner := _inner_section(info.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _inner_section(annotation: Any) -> type[Section] | None:
    """The section inside an annotation such as `GroupLora | None` or `list[Source]`."""
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    return next((inner for inner in map(_inner_section, get_args(annotation)) if inner), None)
