"""Exact match of greedy answers, overall and by language."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lola_ft.data import encode_texts
from lola_ft.generation import Answer, Sampling, answer_in_order


@dataclass
class ExactMatch:
    """Counts of right answers.

    Attributes:
        right, asked: Number of right answers and of questions, by language.
        stopped: Number of answers that the model ended by itself, with its end-of-text token.
        confused: Counts of wrong answers, by the pair of the right answer and the model's answer.
    """

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    stopped: int = 0
    confused: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """The share of right answers over all languages together."""
        return self.right.total() / max(self.asked.total(), 1)

    @property
    def stopped_share(self) -> float:
        return self.stopped / max(self.asked.total(), 1)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        counts = {"right": dict(self.right), "asked": dict(self.asked)}
        return {"accuracy": self.accuracy, "stopped_share": self.stopped_share, **counts}

    def most_confused(self, count: int) -> list[tuple[str, str, int]]:
        """Return right answer, given answer and count, most frequent first; ties in alphabetical order."""
        ranked = sorted(self.confused.items(), key=lambda item: (-item[1], item[0]))
        return [(right, given, times) for (right, given), times in ranked[:count]]

    def accuracy_of(self, *languages: str) -> float:
        """Return the share of right answers in the given languages together."""
        right, asked = (sum(counts[language] for language in languages) for counts in (self.right, self.asked))
        return right / max(asked, 1)


def exact_match_by_language(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    batch_size: int = 128,
    max_new_tokens: int = 16,
) -> ExactMatch:
    """Let a causal model answer each row's prompt greedily, and compare the answer with the row's completion.

    Prompts are tokenised as in training; an answer counts up to the end-of-text token.

    Args:
        rows: Rows with `prompt`, `completion` and `language`.
        max_new_tokens: Most tokens of an answer; a longer answer is cut, and counts as not stopped.
    """
    result = ExactMatch()
    prompts = encode_texts([row["prompt"] for row in rows], tokenizer)
    answers = answer_in_order(model.eval(), tokenizer, prompts, Sampling(max_new_tokens), batch_size)
    for row, answer in zip(rows, answers, strict=True):
        result.asked[row["language"]] += 1
        result.stopped += answer.ended
        result.right[row["language"]] += is_exact(answer, row["completion"])
        wanted, given = row["completion"].strip(), answer.text.strip()
        if given != wanted:
            result.confused[wanted, given] += 1
    return result


def is_exact(answer: Answer, completion: str) -> bool:
    """Tell whether the model ended its answer and the answer equals the completion, except for outer spaces."""
    return answer.ended and answer.text.strip() == completion.strip()


def best_constant_answer(rows: Sequence[dict[str, str]]) -> tuple[str, float]:
    """Return the single answer that would be right most often, and its share of right answers."""
    answer, count = Counter(row["completion"].strip() for row in rows).most_common(1)[0]
    return answer, count / len(rows)
