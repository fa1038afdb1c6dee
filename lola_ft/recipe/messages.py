"""pydantic's findings in words that a user can act on: the value given, and a value that would be right."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lola_ft.recipe.document import KeyPath
from lola_ft.recipe.keys import describe_key, suggest_key, suggest_word
from lola_ft.recipe.schema import UNION_TAGS


def explain(error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    """Yield each mistake of a recipe: the path of the key to blame, and the message."""
    for detail in error.errors(include_url=False):
        if detail["type"] == _RULES:
            yield from _problems(detail)
        else:
            yield _path(detail), _message(detail, _path(detail))


def broken_rules(error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    """Yield a recipe's broken rules between keys."""
    for detail in error.errors(include_url=False):
        if detail["type"] == _RULES:
            yield from _problems(detail)


def _problems(detail: ErrorDetails) -> Iterator[tuple[KeyPath, str]]:
    for key, message in detail["ctx"]["problems"]:
        yield (*_path(detail), *key), message


def unknown_keys(error: ValidationError) -> list[KeyPath]:
    """Return the paths of keys that the schema does not have."""
    return [_path(detail) for detail in error.errors(include_url=False) if detail["type"] == _UNKNOWN]


def wrong_values(error: ValidationError) -> list[KeyPath]:
    """Return the paths of values that their keys do not accept."""
    others = (_UNKNOWN, _RULES, "missing")
    return [_path(detail) for detail in error.errors(include_url=False) if detail["type"] not in others]


_UNKNOWN = "extra_forbidden"  # pydantic's name of the mistake
_RULES = "rules"  # our own, from schema.Section


def _path(detail: ErrorDetails) -> KeyPath:
    """Return a mistake's path without the names of union alternatives, which an unknown key may have by chance."""
    place = detail["loc"]
    end = len(place) - (detail["type"] == _UNKNOWN)
    return (*(part for part in place[:end] if part not in UNION_TAGS), *place[end:])


def shown(value: Any) -> str:
    """Return a value as its author wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(detail: ErrorDetails, path: KeyPath) -> str:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == _UNKNOWN:
        return f"unknown key.{suggest_key(path)}"
    if kind == "missing":
        return f"missing ({describe_key(path)})"
    if kind == "literal_error":
        words = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        choices = f"one of {', '.join(words)}" if len(words) <= 12 else "a name that transformers knows"
        return f"expected {choices}; got {shown(given)}.{suggest_word(given, words)}"
    if kind in _RANGES:
        return f"must be {_RANGES[kind].format(**context)}; got {shown(given)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}; got {shown(given)}.{_advice(kind, given)}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}; got {shown(given)}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of a sensible size",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text that can be written as UTF-8",
    "list_type": "a list",
    "dict_type": "a mapping such as {key: value}",
    "model_type": "a mapping such as {key: value}",
}

_RANGES = {
    "greater_than_equal": "at least {ge:.10g}",
    "greater_than": "more than {gt:.10g}",
    "less_than_equal": "at most {le:.10g}",
    "less_than": "less than {lt:.10g}",
}


def _advice(kind: str, given: Any) -> str:
    """Return advice on the right form of the value; "" if none is known."""
    if isinstance(given, str) and kind in ("int_type", "float_type"):
        convert: Callable[[str], Any] = int if kind == "int_type" else float
        try:
            convert(given)
        except ValueError:
            return ""
        return f" Write {given.strip()} without quotes."
    if kind == "bool_type" and isinstance(given, str):
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(given.lower(), given.lower())
        return f" Write {meant} without quotes." if meant in ("true", "false") else ""
    if kind == "string_type" and isinstance(given, bool | int | float):
        return " Put it in quotes."
    return ""
