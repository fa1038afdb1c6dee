"""Errors for the user's mistakes. Every other exception is a bug and keeps its traceback.

A message says where the mistake is, what it is, what would be right and how to fix it, in that order:

    data/sw.jsonl:381: field 'output' is missing (found: instruction, answer). Map it with `fields: {output: answer}`.
"""

from numbers import Number


class UserError(Exception):
    """A mistake in the user's input: printed as one message on stderr, exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be run; the message lists all its mistakes, one per line."""


class WriteError(UserError):
    """A file or folder that could not be written. No partial file is left, and the previous content is unchanged."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"{path}: cannot be written ({reason}). Its previous content is unchanged. Make room, give permission, or "
            "choose another place."
        )
        self.reason = reason


class DataError(UserError):
    """A data file or row that cannot be used; names file and line.

    The message may quote the file, so characters that a terminal or a JSON file cannot hold are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointError(UserError):
    """A base model folder or file that cannot be used; names the file and the tensor."""


class NoCheckpointError(CheckpointError):
    """A base model that is not a local folder and was not found on the Hub."""


class AdapterError(UserError):
    """An adapter that does not fit its base or its declared layout; names the tensors."""


class PublishError(UserError):
    """A publication that cannot be sent to the Hub, or that the Hub did not accept completely."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text without its full stop; its type's name if it has no text."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def printable(text: object) -> str:
    """Return text that any terminal can show: half surrogate pairs and control characters are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def in_words(value: object) -> str:
    """Return the kind of a value in JSON's words, for a message: "a list", "a number", "null"."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    return "a number" if isinstance(value, Number) else type(value).__name__
