"""A recipe's text as plain data, with the line and column of each key.

The YAML is read as a tree of nodes and no Python objects are constructed: no tag is executed, every key keeps its
place, and all duplicate keys are found at once. Values follow YAML 1.2: null, true, false, numbers (also `1e-4`),
text, lists and mappings.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import StreamMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

KeyPath = tuple[str | int, ...]
"""The path to a value in a recipe: keys, and indices in lists."""

MAX_DEPTH = 20
MAX_NODES = 20_000
MAX_BYTES = 256 * 1024
"""Largest recipe file. YAML is read slowly, and a larger file is probably a data file."""

_CORE = "tag:yaml.org,2002:"


class Place(NamedTuple):
    """The line and column where a value begins in a file, both counted from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


class BadYaml(Exception):  # noqa: N818 - caught inside this package, never shown to users
    """Text that is not YAML; holds the message and, if known, the place."""

    def __init__(self, message: str, place: Place | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = place


@dataclass
class Document:
    """Plain data, the place of every key and list item, and mistakes that YAML itself accepts."""

    data: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[tuple[KeyPath, Place, str]] = field(default_factory=list)
    nodes: int = 0


def parse_document(text: str) -> Document:
    """Read YAML text; raises BadYaml if it is not one YAML document or is nested too deeply."""
    document = Document()
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        raise BadYaml("nested too deeply for a recipe") from None
    except YAMLError as error:
        raise _bad_yaml(error, text) from None
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise BadYaml(f"not valid YAML ({error})") from None  # exceptions that ruamel lets slip on malformed text
    if root is not None:
        document.places[()] = _place(root.start_mark)
        document.data = _plain(root, (), document)
    return document


def _bad_yaml(error: YAMLError, text: str) -> BadYaml:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = None if mark is None else _place(mark)
    if isinstance(error, ReaderError):  # has no line, only the index of the character
        before = text[: error.position]
        place = Place(before.count("\n") + 1, len(before) - before.rfind("\n"))
    problem = str(getattr(error, "problem", None) or error).partition("\n")[0]
    hint = ". Indent with spaces, not tabs" if "'\\t'" in problem else ""
    if place and "${" in "".join(text.split("\n")[place.line - 1 : place.line]):
        hint = ". Variables such as ${X} are not replaced in a recipe: write the value itself"
    return BadYaml(f"not valid YAML: {problem}{hint}", place)


def _place(mark: StreamMark) -> Place:
    return Place(mark.line + 1, mark.column + 1)


def _plain(node: Node, path: KeyPath, document: Document) -> Any:
    document.nodes += 1
    if len(path) > MAX_DEPTH or document.nodes > MAX_NODES:
        raise BadYaml("nested too deeply or too large for a recipe", _place(node.start_mark))
    kind = str(node.tag).removeprefix(_CORE)
    if isinstance(node, MappingNode) and kind == "map":
        return _mapping(node, path, document)
    if isinstance(node, SequenceNode) and kind == "seq":
        for index, item in enumerate(node.value):
            document.places.setdefault((*path, index), _place(item.start_mark))
        return [_plain(item, (*path, index), document) for index, item in enumerate(node.value)]
    if isinstance(node, ScalarNode) and kind in _SCALARS:
        return _scalar(node.value, kind)
    tag = str(node.tag).replace(_CORE, "!!")
    document.problems.append((path, _place(node.start_mark), f"the tag '{tag}' is not allowed. Remove it"))
    return None


def _mapping(node: MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node.start_mark)
        # An escape such as "\\ud800" gives half a surrogate pair, which no file can hold.
        if not isinstance(key_node, ScalarNode) or any("\ud800" <= char <= "\udfff" for char in key_node.value):
            document.problems.append((path, place, "a key must be plain text"))
            continue
        key = str(key_node.value)
        inner = (*path, key)
        if str(key_node.tag).endswith(":merge"):
            document.problems.append((inner, place, "merge keys (<<) are not supported. Write the settings themselves"))
        elif key in mapping:
            document.problems.append((inner, place, f"given twice, first on line {document.places[inner].line}"))
        else:
            document.places[inner] = place
            mapping[key] = _plain(value_node, inner, document)
    return mapping


def _scalar(text: str, kind: str) -> Any:
    try:
        return _SCALARS[kind](text)
    except ValueError:
        return text  # such as `!!int abc`: the schema then reports the expected type


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    return int(digits, 0) if digits.lstrip("+-").lower().startswith(("0x", "0o", "0b")) else int(digits)


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() in ("true", "yes", "on", "y"),
    "int": _integer,
    "float": lambda text: float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
    "timestamp": str,
    "value": str,
}
