"""Rows that say the same: within the training rows, and between training and validation."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lola_ft.data.example import Example
from lola_ft.errors import DataError


def without_duplicates(examples: Iterable[Example], dropped: Counter[str]) -> Iterator[Example]:
    """The examples but those whose prompt and answer came before, character by character.

    Args:
        dropped: Counts, by language, what is left out.
    """
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
        """The training rows that stay.

        Raises:
            DataError: At the end, naming the first leaked row, if `action` is `error` and there was one.
        """
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
