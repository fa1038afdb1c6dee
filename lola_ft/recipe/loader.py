"""Loading: a YAML file and overrides become a Recipe, or one message with every mistake and its place; and back."""

import copy
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from lola_ft.errors import RecipeError, printable
from lola_ft.files import missing, similar_file
from lola_ft.recipe import unsupported
from lola_ft.recipe.document import MAX_BYTES, BadYaml, Document, KeyPath, Place, parse_document
from lola_ft.recipe.keys import own_key
from lola_ft.recipe.messages import broken_rules, explain, shown, unknown_keys, wrong_values
from lola_ft.recipe.overrides import Overridden, apply_overrides
from lola_ft.recipe.schema import Recipe

_HEADER = "# Every setting of the run, defaults included; `lola-ft train` runs it again.\n"
_LAST = Place(sys.maxsize, 0)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file. Relative paths inside it start at the working directory, as on the command line.
        overrides: Settings such as `train.max_steps=20`; a later override of a key wins.

    Raises:
        RecipeError: The file cannot be read, or the recipe has mistakes. The message lists all of them, one per line,
            such as `recipes/sw.yaml:14:15: adapter.attention.rnak: unknown key. Did you mean 'rank'?`.
    """
    document = _parse(path)
    if not isinstance(document.data, dict):
        given = "it is empty" if document.data is None else f"it holds {shown(document.data)}"
        raise RecipeError(f"{path}: expected a recipe, a mapping such as `base: {{model: …}}`; {given}.")
    overridden = apply_overrides(document.data, overrides)
    recipe, mistakes = _validate(overridden)
    found = [(place, f"{path}:{place}: {_dotted(key)}{message}.") for key, place, message in document.problems]
    found += [_locate(key, message, path, document, overridden) for key, message in mistakes]
    found += [(_LAST, f"override {printable(text)!r}: {problem}.") for text, problem in overridden.problems]
    messages = [message for _, message in sorted(found, key=lambda mistake: mistake[0].line)]
    if messages or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(messages)))
    return recipe


def _parse(path: str | Path) -> Document:
    try:
        text = _content(Path(path)).decode("utf-8-sig")
    except FileNotFoundError:
        similar = similar_file(Path(path))
        raise RecipeError(
            f"{path}: no such recipe. Did you mean '{similar}'?" if similar else missing(Path(path), "recipe")
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder. Give a recipe file.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{printable(path)}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        return parse_document(text)
    except BadYaml as error:
        place = f"{path}:{error.place}" if error.place else str(path)
        raise RecipeError(f"{place}: {error.message}.") from None


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: more than {MAX_BYTES // 1024} kB, too large for a recipe. Is it a data file?")
    return content


def _validate(overridden: Overridden) -> tuple[Recipe | None, list[tuple[KeyPath, str]]]:
    """Return the recipe if it is valid, and its mistakes.

    pydantic checks a section's rules only when all its keys are right. A second pass leaves out unknown keys and a
    third pass leaves out wrong values too, so that those mistakes do not hide broken rules. Problems that these passes
    report at a key left out are consequences of leaving it out, and are dropped.
    """
    mistakes = [*unsupported.find(overridden.data), *_variables(overridden.data, ())]
    try:
        return Recipe.model_validate(overridden.data), mistakes
    except ValidationError as error:
        mistakes += explain(error)
        unknown = unknown_keys(error)
        wrong = list(filter(None, map(own_key, wrong_values(error))))
    rest = _without(overridden.data, unknown)
    try:
        Recipe.model_validate(rest)
    except ValidationError as error:
        mistakes += [(path, message) for path, message in explain(error) if not _leads_to(path, unknown)]
    paths = list(dict.fromkeys(path for _, path in wrong))
    try:
        Recipe.model_validate(_without(rest, paths), context={(section, path[-1]) for section, path in wrong})
    except ValidationError as error:
        mistakes += [(path, text) for path, text in broken_rules(error) if not _leads_to(path, [*unknown, *paths])]
    return None, mistakes


_VARIABLE = re.compile(r"\$\{\w+\}|^\$\w+(?=/|$)")
_FREE_TEXT = ("instruction", "labels")


def _variables(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield the values that name a shell variable, which nothing would replace."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in _FREE_TEXT:
                yield from _variables(inner, (*path, key))
    elif isinstance(value, str) and (found := _VARIABLE.search(value)):
        key = printable(".".join(map(str, path)))
        yield path, f"{found[0]} is not replaced in a recipe. Write the value itself, or add `{key}=…` to the command"


def _leads_to(path: KeyPath, keys: list[KeyPath]) -> bool:
    """Tell whether one of the keys is at `path` or inside it."""
    return any(key[: len(path)] == path for key in keys)


def _without(data: Any, keys: list[KeyPath]) -> Any:
    """Return the data without the given keys."""
    rest = copy.deepcopy(data)
    for *parents, key in keys:
        place = rest
        for part in parents:
            place = place[part]
        del place[key]
    return rest


def _locate(
    path: KeyPath, message: str, file: str | Path, document: Document, overridden: Overridden
) -> tuple[Place, str]:
    """Return a mistake's place and text; mistakes in overrides sort after those in the file."""
    text = f"{_dotted(path)}{message}{'' if message.endswith(('.', '?')) else '.'}"
    for prefix in _prefixes(path):
        if prefix in overridden.origins:
            return _LAST, f"override {printable(overridden.origins[prefix])!r}: {text}"
    place = next(document.places[prefix] for prefix in _prefixes(path) if prefix in document.places)
    return place, f"{file}:{place}: {text}"


def _prefixes(path: KeyPath) -> Iterator[KeyPath]:
    """Return the path itself and then its parents, the nearest first."""
    return (path[:end] for end in range(len(path), -1, -1))


def _dotted(path: KeyPath) -> str:
    return printable(".".join(map(str, path))) + ": " if path else ""


def render_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML text, which `load_recipe` reads back as an equal Recipe."""
    settings = _as_written(recipe.model_dump())
    if recipe.train.max_steps is not None:
        del settings["train"]["epochs"]  # the two exclude each other
    yaml = YAML()
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(settings, stream)
    return _HEADER + stream.getvalue()


def _as_written(value: Any) -> Any:
    """Return settings as a recipe file has them: None left out, unprintable characters escaped in quotes."""
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)
    return value
