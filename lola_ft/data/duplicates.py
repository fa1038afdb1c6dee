"""Rows held out by a hash of their content, and rows that say the same, in training or in training and validation."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lola_ft.data.example import Example
from lola_ft.errors import DataError


def without_duplicates(examples: Iterable[Example], dropped: Counter[str]) -> Iterator[Example]:
    """Yield the examples whose prompt and answer did not come before, character by character; count the others."""
    seen: set[bytes] = set()
    for example in examples:
        digest = _digest(example.identity)
        if digest in seen:
            dropped[example.language] += 1
        else:
            seen.add(digest)
            yield example


@dataclass
class LeakCheck:
    """Finds validation rows among the training rows.

    Attributes:
        validation: The rows held out.
        action: `error` refuses a training row that is also a validation row, `drop` leaves it out of the training
            rows, `allow` keeps it.
        rows: Training rows that are validation rows too: same prompt, same answer; or the same two sentences, whichever
            is translated into which.
        prompts: Training rows with the prompt of a validation row and another answer. They are kept: an instruction
            may well be given with many answers.
    """

    validation: list[Example]
    action: str
    rows: int = 0
    prompts: int = 0
    _places: dict[bytes, str] = field(init=False)
    _prompts: set[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._places = {_digest(said): row.where for row in self.validation for said in (row.split_key, row.identity)}
        self._prompts = {_digest(row.request) for row in self.validation if row.prompt is not None}

    def checked(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the training rows that stay; if `action` is `error`, a DataError names the first leak at the end."""
        first = ""
        for example in examples:
            same = self._places.get(_digest(example.identity))
            place = same or self._places.get(_digest(example.split_key))
            if place is not None:
                self.rows += 1
                what = "row" if same else "two sentences"
                first = first or f"{example.where}: the same {what} as {place}, which is for validation"
            elif example.prompt is not None and _digest(example.request) in self._prompts:
                self.prompts += 1
            if self.action == "allow" or (place is None and not (first and self.action == "error")):
                yield example
        if first and self.action == "error":
            raise DataError(
                f"{first} ({self.rows} such rows in all). Set data.leakage to drop, to leave them out of the training "
                "rows, or to allow."
            )

    def as_dict(self) -> dict[str, str | int]:
        """For the manifest."""
        return {"action": self.action, "rows": self.rows, "prompts": self.prompts}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_validation(example: Example, share: float, seed: int) -> bool:
    """Tell whether a row is held out.

    A hash of the row's own text decides, so that adding a source or another order moves no row, and rows that say
    the same fall on the same side; so do the two directions of a translation, of which each holds the other's answer.

    Args:
        share: Part held out, from 0 to 1.
        seed: Another seed holds out other rows.
    """
    return _draw(example, seed) < share * _DRAWS


_DRAWS = 2**64


def _draw(example: Example, seed: int) -> int:
    """Return a row's number below `_DRAWS`; the row is held out by every share of them above it."""
    digest = hashlib.sha256(f"{seed}\n{example.split_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def hold_out(examples: Iterable[Example], share: float, seed: int, validation: list[Example]) -> Iterator[Example]:
    """Yield the training rows, and put the others into `validation`, in their order; no side may end up empty."""
    training, least, most = 0, _DRAWS, 0
    for example in examples:
        draw = _draw(example, seed)
        least, most = min(least, draw), max(most, draw)
        if is_validation(example, share, seed):
            validation.append(example)
        else:
            training += 1
            yield example
    rows = training + len(validation)
    if share > 0 and rows and not (training and validation):
        side = "validation" if training else "training"
        if least == most:
            advice = "No share divides them, since all say the same"
        elif training:
            advice = f"The smallest share that holds one out is {_above(least / _DRAWS):g}"
        else:
            advice = f"The largest share that leaves one is {most / _DRAWS:.4g}"
        raise DataError(
            f"data.validation {share:g} of {rows} rows leaves no {side} row. {advice}. Or give validation sources."
        )


def _above(number: float) -> float:
    """Return the next number with two digits, such as 0.043 above 0.0421."""
    step = 10.0 ** (math.floor(math.log10(number or 1e-9)) - 1)
    return float(f"{(math.floor(number / step) + 1) * step:.2g}")
