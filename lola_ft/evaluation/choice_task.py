"""Task `choice`: the model's answer is the choice with the highest likelihood after the prompt.

A choice's likelihood is the sum of its tokens' log-probabilities, without the end-of-text token. The second measure
divides it by the choice's bytes in UTF-8, because a long choice has a smaller sum. Prompt and choice are tokenised
separately, as in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lola_ft.console import shown_progress
from lola_ft.data import Example, PromptTemplate, encode_texts
from lola_ft.data.encoding import MASKED
from lola_ft.data.encoding import Sequence as Tokens
from lola_ft.evaluation.bootstrap import ratio
from lola_ft.evaluation.scoring import score
from lola_ft.evaluation.task import Measure, Measured
from lola_ft.open_model import OpenModel


@dataclass(frozen=True)
class Question:
    """A row with its choices.

    Attributes:
        example: The row, with the right choice as completion.
        right: Index of the right choice.
    """

    example: Example
    choices: tuple[str, ...]
    right: int


class ChoiceTask:
    """The task that compares the likelihoods of choices."""

    name = "choice"
    measures: Mapping[str, Measure] = {
        "accuracy": Measure("accuracy", ratio, percent=True),
        "accuracy_per_byte": Measure("accuracy, per byte", ratio, percent=True),
        "chance": Measure("chance", ratio, percent=True),
    }

    def __init__(self, questions: Sequence[Question], batch_size: int) -> None:
        self.questions, self.batch_size = questions, batch_size
        self.languages = [question.example.language for question in questions]
        self.places = [question.example.where for question in questions]

    def run(self, opened: OpenModel, template: PromptTemplate) -> Measured:
        """Score every choice of every row."""
        sequences = [tokens for question in self.questions for tokens in _sequences(question, opened, template)]
        with shown_progress("Scoring choices", 1) as advance:
            nats = iter(score(opened.model, sequences, self.batch_size, advance=advance))
        rows = []
        for question in self.questions:
            likelihoods = [-float(next(nats).sum()) for _ in question.choices]
            per_byte = [one / len(text.encode()) for one, text in zip(likelihoods, question.choices, strict=True)]
            rows.append(
                {
                    "choices": list(question.choices),
                    "right": question.right,
                    "log_likelihoods": likelihoods,
                    "taken": int(np.argmax(likelihoods)),
                    "taken_per_byte": int(np.argmax(per_byte)),
                }
            )
        parts = {
            "accuracy": [(row["taken"] == row["right"], 1) for row in rows],
            "accuracy_per_byte": [(row["taken_per_byte"] == row["right"], 1) for row in rows],
            "chance": [(1 / len(question.choices), 1) for question in self.questions],
        }
        return Measured({name: np.array(part, dtype=np.float64) for name, part in parts.items()}, rows)


def _sequences(question: Question, opened: OpenModel, template: PromptTemplate) -> list[Tokens]:
    prompt = template.prompt_ids(question.example, opened.tokenizer)
    choices = encode_texts(list(question.choices), opened.tokenizer)
    return [Tokens([*prompt, *ids], [*[MASKED] * len(prompt), *ids]) for ids in choices]
