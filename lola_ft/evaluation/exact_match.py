"""Exact match of greedy answers, overall and by language."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lola_ft.data import encode_texts


@dataclass
class ExactMatch:
    """How many answers were right.

    Attributes:
        right, asked: By language.
        stopped: Answers that the model ended by itself, with its end-of-text token.
    """

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    stopped: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers over all languages together."""
        return self.right.total() / max(self.asked.total(), 1)

    @property
    def stopped_share(self) -> float:
        return self.stopped / max(self.asked.total(), 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, to be written as JSON."""
        counts = {"right": dict(self.right), "asked": dict(self.asked)}
        return {"accuracy": self.accuracy, "stopped_share": self.stopped_share, **counts}

    def accuracy_of(self, language: str) -> float:
        return self.right[language] / max(self.asked[language], 1)


@torch.no_grad()
def exact_match_by_language(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    batch_size: int = 128,
    max_new_tokens: int = 16,
) -> ExactMatch:
    """Let a causal model answer each row's prompt, greedily, and compare with its completion.

    Prompts are tokenised as in training and padded on the left; an answer counts up to the end-of-text token and must
    equal the completion but for surrounding spaces.

    Args:
        rows: `prompt`, `completion` and `language` each.
        max_new_tokens: Longest answer; a longer one is cut, and counts as not stopped.
    """
    result = ExactMatch()
    model.eval()
    for batch, ids_BS in _batches(rows, tokenizer, batch_size):
        generated = model.generate(
            input_ids=ids_BS.input.to(model.device),
            attention_mask=ids_BS.mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=_pad_id(tokenizer),
        )
        for row, answer in zip(batch, generated[:, ids_BS.input.shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in answer
            text = tokenizer.decode(answer[: answer.index(tokenizer.eos_token_id)] if ended else answer)
            result.asked[row["language"]] += 1
            result.stopped += ended
            result.right[row["language"]] += ended and text.strip() == row["completion"].strip()
    return result


def best_constant_answer(rows: Sequence[dict[str, str]]) -> tuple[str, float]:
    """The one answer that would be right most often if it were always given, and how often it would be."""
    answer, count = Counter(row["completion"].strip() for row in rows).most_common(1)[0]
    return answer, count / len(rows)


@dataclass(frozen=True)
class _Padded:
    input: Tensor
    mask: Tensor


def _batches(
    rows: Sequence[dict[str, str]], tokenizer: Any, batch_size: int
) -> Iterator[tuple[list[dict[str, str]], _Padded]]:
    """Batches of prompts of like length, padded on the left."""
    prompts = encode_texts([row["prompt"] for row in rows], tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        padding = [[_pad_id(tokenizer)] * (width - len(prompts[i])) for i in chosen]
        ids = torch.tensor([pad + prompts[i] for pad, i in zip(padding, chosen, strict=True)])
        mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])
        yield [rows[i] for i in chosen], _Padded(ids, mask)


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
