"""Prompts that are too long for a model. They are found before weights are loaded, and refused, skipped or cut."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lola_ft.data import Example, PromptTemplate
from lola_ft.data.turns import Turn
from lola_ft.errors import DataError
from lola_ft.generation.answers import Sampling
from lola_ft.open_model import PromptReader

POLICIES = ("error", "skip", "truncate")


@dataclass(frozen=True)
class Overlong:
    """A row whose prompt leaves a model no position for an answer.

    Attributes:
        model: The first model for which the prompt is too long.
        tokens: Number of tokens of the prompt for that model.
        positions: Number of positions of that model.
    """

    example: Example
    model: str
    tokens: int
    positions: int

    def refused(self, others: int) -> DataError:
        """Return the error for this row; `others` counts further rows that are too long."""
        more = f" So {'are' if others > 1 else 'is'} {others} more." if others else ""
        return DataError(
            f"{self.example.where}: the prompt has {self.tokens} tokens, and {self.model} has {self.positions} "
            f"positions for prompt and answer together.{more} Shorten it, or leave such rows out with --overlong skip, "
            "or cut them with --overlong truncate."
        )


def find_overlong(
    examples: Sequence[Example], readers: Sequence[tuple[PromptReader, PromptTemplate]]
) -> dict[int, Overlong]:
    """Return the rows that are too long for at least one model, by their index among the examples."""
    found = dict[int, Overlong]()
    for reader, template in readers:
        for place, example in enumerate(examples):
            tokens = len(template.prompt_ids(example, reader.tokenizer))
            if tokens >= reader.positions:
                found.setdefault(place, Overlong(example, reader.subject.name, tokens, reader.positions))
    return dict(sorted(found.items()))


def say_rows(found: dict[int, Overlong]) -> str:
    """Return the counts of rows by language as text, `en 2, sw 1`, the largest first."""
    return ", ".join(f"{code} {count}" for code, count in languages_of(found).most_common())


def languages_of(found: dict[int, Overlong]) -> Counter[str]:
    """Count the rows by language."""
    return Counter(sorted(row.example.language for row in found.values()))


def cut_prompt(turns: Sequence[Turn], positions: int, sampling: Sampling) -> list[int]:
    """Return the end of a prompt that leaves room for a full answer, or for half of the positions if that is less.

    As in training, first a conversation's earliest exchanges are cut, then the beginning of the last prompt.

    Args:
        turns: The row's exchanges; the answer of the last one is not part of the prompt.
        positions: Number of positions of the model.
    """
    room = max(positions - sampling.max_new_tokens, positions // 2)
    *earlier, last = turns
    while earlier and sum(len(turn.prompt) + len(turn.answer) for turn in earlier) + len(last.prompt) > room:
        del earlier[0]
    ids = [*(token for turn in earlier for token in (*turn.prompt, *turn.answer)), *last.prompt]
    return ids[-room:]
