"""One check of the doctor: its result, and advice if it failed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import get_token

Status = Literal["ok", "missing", "failed"]
_LONGEST = 300


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        detail: The finding, in one line.
        advice: How to fix the problem; "" if the check is ok.
        core: True if fine-tuning needs it.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""
    core: bool = False


def examine(name: str, look: Callable[[], str], advice: str, core: bool) -> Check:
    """Run a probe, which returns the detail, or raises: MissingError if something is missing, else any exception."""
    try:
        return Check(name, "ok", look(), core=core)
    except MissingError as missing:
        return Check(name, "missing", without_token(str(missing)), advice, core)
    except Exception as error:  # any exception is the check's result
        text = " ".join(str(error).split())[:_LONGEST]
        kind = type(error).__name__
        return Check(name, "failed", without_token(f"{kind}: {text}" if text else kind), advice, core)


class MissingError(Exception):
    """Something is missing, or there is not enough of it."""


def without_token(text: str) -> str:
    """Return text with a Hub token in it replaced, so that it may be shown."""
    token = get_token()
    return text.replace(token, "[token]") if token else text
