"""Held-out rows, chosen row by row by a hash of the row's content."""

import hashlib
from collections.abc import Iterable, Iterator

from lola_ft.data.example import Example
from lola_ft.errors import DataError


def is_validation(example: Example, share: float, seed: int) -> bool:
    """Tell whether a row is held out.

    A hash of the row's own text decides, so that adding a source or another order moves no row, and rows that say
    the same fall on the same side; so do the two directions of a translation, of which each holds the other's answer.

    Args:
        share: Part held out, from 0 to 1.
        seed: Another seed holds out other rows.
    """
    digest = hashlib.sha256(f"{seed}\n{example.split_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def hold_out(examples: Iterable[Example], share: float, seed: int, validation: list[Example]) -> Iterator[Example]:
    """The training rows, one after the other; the others are put into `validation`, each side in its old order.

    Raises:
        DataError: At the end, if one of the sides is empty.
    """
    training = 0
    for example in examples:
        if is_validation(example, share, seed):
            validation.append(example)
        else:
            training += 1
            yield example
    rows = training + len(validation)
    if share > 0 and rows and not (training and validation):
        side = "validation" if training else "training"
        raise DataError(
            f"data.validation {share:g} of {rows} rows leaves no {side} row. "
            "Change the share, or give validation sources of its own."
        )
