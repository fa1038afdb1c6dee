"""The user's mistakes. Everything else that goes wrong is a bug and keeps its traceback.

A message says where, what, what would be right and how to fix it, in that order:

    data/sw.jsonl:381: field 'output' is missing (found: instruction, answer). Map it with `fields: {output: answer}`.
"""

from numbers import Number


class UserError(Exception):
    """A mistake in what the user gave us: shown as one message on stderr, exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be run; the message lists all its mistakes, one a line."""


class WriteError(UserError):
    """A file or folder that the disk did not take; nothing partial is left, and what was there before is untouched."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"{path}: cannot be written ({reason}). What was there is as it was. Make room, give permission, or choose "
            "another place."
        )
        self.reason = reason


class DataError(UserError):
    """A data file or row that cannot be used; names file and line.

    It may quote what the file holds, so what no terminal can show and no JSON file can hold is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointError(UserError):
    """A base model folder or file that cannot be used; names the file and the tensor."""


class NoCheckpointError(CheckpointError):
    """A base model that is neither a folder here nor, as far as can be told, on the Hub."""


class AdapterError(UserError):
    """An adapter that does not fit its base or its declared layout; names the tensors."""


class PublishError(UserError):
    """Something that cannot be sent to the Hub, or that the Hub did not take; nothing half-sent counts as done."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text without its full stop; its type's name where it has no text."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def printable(text: object) -> str:
    """Text that any terminal can show: half surrogate pairs and control characters are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def in_words(value: object) -> str:
    """Name the kind of a value in JSON's words, for a message: "a list", "a number", "null"."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    return "a number" if isinstance(value, Number) else type(value).__name__
