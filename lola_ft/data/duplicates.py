"""Rows held out by a hash of their content, and equal rows: within training, or in training and validation."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lola_ft.data.example import Example
from lola_ft.errors import DataError


def without_duplicates(examples: Iterable[Example], dropped: Counter[str]) -> Iterator[Example]:
    """Yield the first example of each exact prompt and answer, and count the repeats by language."""
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
        rows: Number of training rows that are also validation rows: the same prompt and answer, or a translation of the
            same two sentences in either direction.
        prompts: Number of training rows with the prompt of a validation row and another answer. They are kept, because
            one instruction can have many answers.
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
        """Yield the training rows to keep; with `action` `error`, raise a DataError with the first leak at the end."""
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
                f"{first} ({self.rows} such rows in all). Set data.leakage to drop, which leaves them out of the "
                "training rows, or to allow, which keeps them."
            )

    def as_dict(self) -> dict[str, str | int]:
        """Return the facts for the manifest."""
        return {"action": self.action, "rows": self.rows, "prompts": self.prompts}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_validation(example: Example, share: float, seed: int) -> bool:
    """Tell whether a row is held out.

    A hash of the row's own text decides. So no row moves when a source is added or the order changes, and equal rows
    are on the same side. The two directions of a translation are on the same side too, because each contains the
    other's answer.

    Args:
        share: Share to hold out, from 0 to 1.
        seed: A different seed holds out different rows.
    """
    return _draw(example, seed) < share * _DRAWS


_DRAWS = 2**64


def _draw(example: Example, seed: int) -> int:
    """Return a row's fixed number n below `_DRAWS`; a share above n / `_DRAWS` holds the row out."""
    digest = hashlib.sha256(f"{seed}\n{example.split_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def hold_out(examples: Iterable[Example], share: float, seed: int, validation: list[Example]) -> Iterator[Example]:
    """Yield the training rows and append the others to `validation`; raises DataError if either side stays empty."""
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
            advice = "No share divides them, because all rows are equal"
        elif training:
            advice = f"The smallest share that holds out one row is {_above(least / _DRAWS):g}"
        else:
            advice = f"The largest share that leaves one row is {most / _DRAWS:.4g}"
        raise DataError(
            f"data.validation {share:g} of {rows} rows leaves no {side} row. {advice}. Or give validation sources."
        )


def _above(number: float) -> float:
    """Return the next larger number with two digits, such as 0.043 for 0.0421."""
    step = 10.0 ** (math.floor(math.log10(number or 1e-9)) - 1)
    return float(f"{(math.floor(number / step) + 1) * step:.2g}")
