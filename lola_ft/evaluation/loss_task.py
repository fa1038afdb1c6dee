"""Task `loss`: nats per token and bits per byte.

`loss` is the loss of training: over all tokens of an answer and its end-of-text token under the model's template, or
over all tokens of a text except the first, and its end-of-text token. `bits_per_byte` does not depend on the tokenizer:
it is the loss of the answer's or text's tokens, without the end of text, divided by their bytes in UTF-8. Nothing
predicts the first token of a text, so it is only context and its bytes are not counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import log
from typing import Any

import numpy as np

from lola_ft.console import Advance, shown_progress
from lola_ft.data import Example, PromptTemplate
from lola_ft.data.encoding import MASKED, TokenizedRow, tokenize
from lola_ft.errors import UserError
from lola_ft.evaluation.bootstrap import Floats, ratio
from lola_ft.evaluation.scoring import score
from lola_ft.evaluation.task import Measure, Measured
from lola_ft.open_model import OpenModel

_ROWS = 256  # rows tokenised at a time


class LossTask:
    """The task that scores each row's answers, or its text."""

    name = "loss"
    measures: Mapping[str, Measure] = {
        "bits_per_byte": Measure("bits per byte", ratio, lower_is_better=True),
        "loss": Measure("loss (nats per token)", ratio, lower_is_better=True),
    }

    def __init__(self, examples: Sequence[Example], batch_size: int, stride: int | None = None) -> None:
        self.examples, self.batch_size, self.stride = examples, batch_size, stride
        self.languages = [example.language for example in examples]
        self.places = [example.where for example in examples]

    def run(self, opened: OpenModel, template: PromptTemplate) -> Measured:
        """Score every row; raises UserError if the stride leaves no context or the tokenizer loses bytes."""
        positions = opened.sizes.positions
        if self.stride is not None and not 0 < self.stride < positions:
            raise UserError(f"--stride is {self.stride}; it must be between 1 and {positions - 1} for this model.")
        bits, loss = list[tuple[float, int]](), list[tuple[float, int]]()
        with shown_progress("Scoring", len(self.examples), "rows") as advance:
            for row, own in self._scored(opened, template, advance):
                loss.append((own.sum(), len(own)))
                bits.append((own[_is_text(row)].sum() / log(2), predicted_bytes(row, opened.tokenizer)))
        written = [{"nats": one[0], "tokens": one[1], "bytes": two[1]} for one, two in zip(loss, bits, strict=True)]
        return Measured({"bits_per_byte": np.array(bits), "loss": np.array(loss)}, written)

    def _scored(
        self, opened: OpenModel, template: PromptTemplate, advance: Advance
    ) -> Iterator[tuple[TokenizedRow, Floats]]:
        """Yield each row with the nats of its labelled tokens; a few hundred rows are tokenised at a time."""
        for start in range(0, len(self.examples), _ROWS):
            rows = list(tokenize(list(self.examples[start : start + _ROWS]), opened.tokenizer, template))
            counted = partial(_advance_by, advance, len(rows))
            sequences = [row.whole for row in rows]
            yield from zip(rows, score(opened.model, sequences, self.batch_size, self.stride, counted), strict=True)


def _advance_by(advance: Advance, rows: int, share: float) -> None:
    advance(rows * share)


def predicted_bytes(row: TokenizedRow, tokenizer: Any) -> int:
    """Return the bytes of the scored tokens.

    Raises:
        UserError: The tokens' bytes are not the text's bytes, so a token's share of them is unknown.
    """
    total = 0
    for turn in row.turns:
        if not turn.learned:
            continue
        sizes = [len(piece) for piece in tokenizer.convert_ids_to_tokens(turn.answer[:-1])]
        size = len(turn.text.encode())
        if sum(sizes) != size:
            raise UserError(
                f"{row.example.where}: the tokenizer turns a text of {size} bytes into {sum(sizes)} bytes. Bits per "
                "byte needs a tokenizer that keeps every byte, such as LOLA's (byte-level BPE)."
            )
        total += size if turn.prompt else size - sizes[0]
    return total


def _is_text(row: TokenizedRow) -> np.ndarray:
    """Return a mask of the labelled tokens that are text, not an end-of-text token."""
    ends = [flag for turn in row.turns for flag in [*[False] * (len(turn.prompt) + len(turn.answer) - 1), True]]
    return np.array([not end for end, label in zip(ends, row.whole.labels, strict=True) if label != MASKED], dtype=bool)
