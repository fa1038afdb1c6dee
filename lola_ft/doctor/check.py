"""One check of the doctor: its result, and how to fix what is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import get_token

Status = Literal["ok", "missing", "failed"]
_LONGEST = 300


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        detail: What was seen, in a line.
        mend: Advice where the check is not ok; empty where it is.
        core: Whether fine-tuning needs it.
    """

    name: str
    status: Status
    detail: str
    mend: str = ""
    core: bool = False


def examine(name: str, look: Callable[[], str], mend: str, core: bool) -> Check:
    """Run a probe, whose result is the detail. It fails by raising, by `MissingError` where something is not there."""
    try:
        return Check(name, "ok", look(), core=core)
    except MissingError as missing:
        return Check(name, "missing", without_token(str(missing)), mend, core)
    except Exception as error:  # whatever goes wrong is the check's result
        text = " ".join(str(error).split())[:_LONGEST]
        kind = type(error).__name__
        return Check(name, "failed", without_token(f"{kind}: {text}" if text else kind), mend, core)


class MissingError(Exception):
    """Something is not there, or there is not enough of it."""


def without_token(text: str) -> str:
    """Text that may be shown: a Hub token in it is taken out."""
    token = get_token()
    return text.replace(token, "[token]") if token else text
