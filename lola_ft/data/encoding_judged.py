"""Encoding of judged answers: a pair of answers for DPO, one answer and its label for KTO.

Prompt and answers are tokenised as in `encode`, each answer with its EOS. The earlier answers of a conversation belong
to the prompt. A pair counts as two sequences. The columns `input_ids` and `labels` hold a row's sequences one after the
other, for counting, mixing and showing. TRL trains on the other columns.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lola_ft.data.chat_template import PromptTemplate
from lola_ft.data.encoding import (
    MASKED,
    Encoded,
    TokenizedRow,
    batches,
    dataset_of,
    refuse_nothing_left,
    tokenize,
    too_long,
)
from lola_ft.data.encoding_report import Counts, EncodingReport
from lola_ft.data.example import Example
from lola_ft.data.turns import eos_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Judged = tuple[list[int], list[list[int]]]
"""The ids of a prompt, and the ids of its answers: chosen and rejected, or the single answer with a label."""


def encode_judged(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerFast",
    template: PromptTemplate,
    max_length: int,
    overlong: str = "drop",
) -> Encoded:
    """Encode pairs of answers, or answers with labels, in their order.

    Args:
        examples: Examples that all have a rejected answer, or all have a label.
        max_length: Longest sequence in tokens: the prompt and the longer answer with its EOS.
        overlong: drop, error, or truncate, which cuts the prompt's beginning, then an answer's end; EOS stays.

    Raises:
        DataError: No examples, no rows left, a row that is too long under `error`, a tokenizer without EOS.
    """
    eos_of(tokenizer)
    report, languages, shortest = EncodingReport(), list[str](), sys.maxsize
    columns: dict[str, list[Any]] = {}
    for batch in batches(examples):
        pairs = [row for row in batch if row.rejected is not None]
        rejected = iter(tokenize([replace(row, completion=str(row.rejected)) for row in pairs], tokenizer, template))
        for row in tokenize(batch, tokenizer, template):
            other = [next(rejected).turns[-1].answer] if row.example.rejected is not None else []
            prompt, answers = _judged(row, other)
            counts = report.of(row.example.language)
            length = len(prompt) + max(map(len, answers))
            shortest = min(shortest, length)
            whole = (prompt, answers)
            fitted = whole if length <= max_length else _fit(row, whole, max_length, overlong, counts)
            _count(counts, row.example, answers, fitted)
            if fitted is None:
                continue
            languages.append(sys.intern(row.example.language))
            for name, value in _columns(row.example, *fitted).items():
                columns.setdefault(name, []).append(value)
    refuse_nothing_left(report, shortest, max_length)
    return Encoded(dataset_of(_table(columns)), languages, report)


def _judged(row: TokenizedRow, other: list[list[int]]) -> Judged:
    *earlier, last = row.turns
    before = [token for turn in earlier for token in (*turn.prompt, *turn.answer)]
    return [*before, *last.prompt], [last.answer, *other]


def _fit(row: TokenizedRow, whole: Judged, max_length: int, overlong: str, counts: Counts) -> Judged | None:
    """Apply the policy to a row that is too long; returns None if the row is left out."""
    prompt, answers = whole
    length = len(prompt) + max(map(len, answers))
    if overlong == "error":
        raise too_long(row.example, length, max_length)
    if overlong == "drop":
        counts.dropped += 1
        return None
    counts.truncated += 1
    counts.answers_cut += any(len(answer) > max_length for answer in answers)
    cut = [answer if len(answer) <= max_length else [*answer[: max_length - 1], answer[-1]] for answer in answers]
    room = max_length - max(map(len, cut))
    return prompt[len(prompt) - room :] if room else [], cut


def _count(counts: Counts, example: Example, answers: list[list[int]], fitted: Judged | None) -> None:
    texts = [example.completion, *([] if example.rejected is None else [example.rejected])]
    counts.rows += 1
    counts.kept += fitted is not None
    counts.answer_tokens += sum(len(answer) - 1 for answer in answers)
    counts.answer_bytes += sum(len(text.encode()) for text in texts)
    counts.answer_words += sum(len(text.split()) for text in texts)
    if fitted is not None:
        prompt, kept = fitted
        trained = sum(map(len, kept))
        counts.sequences += len(kept)
        counts.tokens += len(prompt) * len(kept) + trained
        counts.trained_tokens += trained


def _columns(example: Example, prompt: list[int], answers: list[list[int]]) -> dict[str, Any]:
    shown = {
        "input_ids": [token for answer in answers for token in (*prompt, *answer)],
        "labels": [label for answer in answers for label in (*[MASKED] * len(prompt), *answer)],
        "prompt_ids": prompt,
    }
    if example.rejected is not None:
        return shown | {"chosen_ids": answers[0], "rejected_ids": answers[1]}
    return shown | {"completion_ids": answers[0], "label": [int(bool(example.desirable))]}


def _table(columns: dict[str, list[Any]]) -> Any:
    import pyarrow

    kind = pyarrow.list_(pyarrow.int32())
    return pyarrow.table({name: pyarrow.array(values, kind) for name, values in columns.items()})
