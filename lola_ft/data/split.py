"""Which rows are held out: decided row by row, by what the row says."""

import hashlib
from collections.abc import Iterable

from lola_ft.data.example import Example
from lola_ft.errors import DataError


def is_validation(example: Example, share: float, seed: int) -> bool:
    """Whether a row is held out.

    A hash of the row's own text decides, so that adding a source or another order moves no row, and rows that say
    the same fall on the same side.

    Args:
        share: Part held out, from 0 to 1.
        seed: Another seed holds out other rows.
    """
    prompt = example.prompt["prompt"] if example.prompt else ""
    digest = hashlib.sha256(f"{seed}\n{len(prompt)}\n{prompt}\n{example.completion}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_validation(examples: Iterable[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Divide examples into (training, validation), each in its old order.

    Raises:
        DataError: A share was asked for, and one of the sides is empty.
    """
    training: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        (validation if is_validation(example, share, seed) else training).append(example)
    rows = len(training) + len(validation)
    if share > 0 and rows and not (training and validation):
        side = "validation" if training else "training"
        raise DataError(
            f"data.validation {share:g} of {rows} rows leaves no {side} row. "
            "Change the share, or give validation sources of its own."
        )
    return training, validation
