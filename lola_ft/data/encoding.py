"""Encoding: examples become token ids and labels, with a policy for rows that are too long.

A sequence is the prompt's ids, the answer's ids, and the token that ends an answer. A conversation repeats this:

    ids      prompt 1   answer 1 <end>   prompt 2   answer 2 <end>
    labels   -100 …     answer 1 <end>   -100 …     answer 2 <end>

Prompt and answer are tokenised separately: at inference the model gets only the prompt's ids, so the boundary must not
depend on the answer. Prompts and answers that are only read have the label -100 (masked). All of a plain text is
learned except its first token: nothing precedes it, and in a packed row the token before it is another document's.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lola_ft.data.chat_template import PromptTemplate
from lola_ft.data.encoding_report import Counts, EncodingReport
from lola_ft.data.example import Example
from lola_ft.data.parallel import map_in_order
from lola_ft.data.table_store import TableSink
from lola_ft.data.turns import Turn, encode_texts, eos_of
from lola_ft.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

MASKED = -100
"""The label of a token that is only read, not learned."""

_BATCH = 1000


@dataclass(frozen=True)
class Encoded:
    """Sequences with the columns `input_ids` and `labels`, and the report on the rows."""

    dataset: "Dataset"
    languages: list[str]
    """Each sequence's language code."""
    report: EncodingReport


class Sequence(NamedTuple):
    """Token ids and their labels: a label is the token's id if it is learned, MASKED if it is only read."""

    ids: list[int]
    labels: list[int]


def encode(
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerFast",
    template: PromptTemplate,
    max_length: int,
    overlong: str = "drop",
    file: Path | None = None,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Encoded:
    """Encode examples in their order. Only a few batches of texts are in memory at a time.

    Args:
        examples: Any iterable, also a generator.
        template: Renders the prompts; plain texts have no prompt.
        max_length: Longest sequence in tokens, EOS included; at least 2.
        overlong: The policy for longer rows:
            drop: leave the row out and count it.
            error: raise a DataError that names the row.
            truncate: cut a conversation's first exchanges, then the prompt's beginning. An answer that is too long even
                without its prompt, or a text, loses its end. EOS stays.
            split: cut a text into several sequences. They overlap by one token, so that every token is learned exactly
                once and has a predecessor. A row with a prompt is refused: a piece of an answer without its prompt
                teaches nothing, and pieces with the prompt would end without EOS.
        file: File to write the sequences to, which are then mapped from it. None keeps them in memory.
        workers: Number of threads that tokenise; the result does not depend on it.
        progress: Called after each batch with its number of rows.

    Raises:
        DataError: No examples, no rows left, a row that is too long under `error`, a tokenizer without EOS.
    """
    assert max_length >= 2, f"max_length {max_length} leaves no room for a token and its EOS"
    eos_of(tokenizer)
    report, shortest, texts = EncodingReport(), list[int](), True
    encoder = Encoder(tokenizer, template, max_length, overlong)
    with TableSink(file) as sink:
        for batch in map_in_order(encoder, batches(examples), workers):
            report.add(batch.report)
            shortest.append(batch.shortest)
            texts = texts and batch.texts
            sink.write(batch.table)
            if progress:
                progress(batch.report.total.rows)
    refuse_nothing_left(report, min(shortest, default=0), max_length, texts)
    return encoded_of(sink.table, report)


def refuse_nothing_left(report: EncodingReport, shortest: int, max_length: int, texts: bool = False) -> None:
    """Raise DataError if no row is left.

    Args:
        shortest: Number of tokens of the shortest row.
        texts: No row has a prompt.
    """
    if not report.languages:
        raise DataError("there are no rows to encode.")
    if not report.total.kept:
        raise DataError(
            f"none of the {report.total.rows} rows is left: the shortest has {shortest} tokens, and data.max_length is "
            f"{max_length}. "
            + (
                "Set data.overlong to split, which learns all of a long text in pieces."
                if texts
                else "Raise data.max_length, or set data.overlong to truncate."
            )
        )


class EncodedBatch(NamedTuple):
    """A batch's sequences, the report on its rows, the tokens of the shortest row, and whether all are plain texts."""

    table: "pyarrow.Table"
    report: EncodingReport
    shortest: int
    texts: bool


@dataclass(frozen=True)
class Encoder:
    """Encodes one batch of examples."""

    tokenizer: "PreTrainedTokenizerFast"
    template: PromptTemplate
    max_length: int
    overlong: str

    def __call__(self, batch: list[Example]) -> EncodedBatch:
        """Encode a batch of at least one example; raises DataError as `encode` does."""
        fit, report = _POLICIES[self.overlong], EncodingReport()
        sequences, languages, lengths = list[Sequence](), list[str](), list[int]()
        for row in tokenize(batch, self.tokenizer, self.template):
            counts = report.of(row.example.language)
            fitted = [row.whole] if row.length <= self.max_length else fit(row, self.max_length, counts)
            _count(counts, row, fitted)
            sequences += fitted
            languages += [row.example.language] * len(fitted)
            lengths.append(row.length)
        texts = all(example.prompt is None for example in batch)
        return EncodedBatch(_arrow(sequences, languages), report, min(lengths), texts)


def encoded_of(table: "pyarrow.Table", report: EncodingReport) -> Encoded:
    """Make encoded rows from their columns, which are in memory or mapped from a file."""
    languages = [sys.intern(code) for code in table["language"].to_pylist()]
    return Encoded(dataset_of(table.drop_columns("language")), languages, report)


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """An example as token ids, turn by turn; a plain text is one turn without a prompt."""

    example: Example
    turns: list[Turn]

    @property
    def is_text(self) -> bool:
        return self.example.prompt is None

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return _length(self.turns)

    @property
    def whole(self) -> Sequence:
        """The row as one sequence."""
        return _joined(self.turns)


def _joined(turns: list[Turn]) -> Sequence:
    """Join prompts and answers in their order. The very first token is never learned: nothing precedes it."""
    ids, labels = list[int](), list[int]()
    for turn in turns:
        ids += [*turn.prompt, *turn.answer]
        labels += [*[MASKED] * len(turn.prompt), *(turn.answer if turn.learned else [MASKED] * len(turn.answer))]
    return Sequence(ids, [MASKED, *labels[1:]])


def _length(turns: list[Turn]) -> int:
    return sum(len(turn.prompt) + len(turn.answer) for turn in turns)


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield examples in batches that fit into memory as text."""
    iterator = iter(examples)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def tokenize(
    batch: list[Example], tokenizer: "PreTrainedTokenizerFast", template: PromptTemplate
) -> Iterator[TokenizedRow]:
    """Yield examples as token ids, not cut to any length."""
    eos = eos_of(tokenizer)
    texts = iter(encode_texts([row.completion for row in batch if row.prompt is None], tokenizer))
    turns = iter(template.turns([row for row in batch if row.prompt is not None], tokenizer))
    for row in batch:
        is_text = row.prompt is None
        yield TokenizedRow(row, [Turn([], [*next(texts), eos], row.completion)] if is_text else next(turns))


def _drop(_row: TokenizedRow, _max_length: int, counts: Counts) -> list[Sequence]:
    counts.dropped += 1
    return []


def _refuse(row: TokenizedRow, max_length: int, _counts: Counts) -> list[Sequence]:
    raise too_long(row.example, row.length, max_length)


def too_long(example: Example, length: int, max_length: int) -> DataError:
    """Return the error for a row that is longer than `max_length`."""
    policies = "split" if example.prompt is None else "drop or truncate"
    return DataError(
        f"{example.where}: {length} tokens, more than data.max_length {max_length}. Shorten the row, raise "
        f"data.max_length, or set data.overlong to {policies}."
    )


def _truncate(row: TokenizedRow, max_length: int, counts: Counts) -> list[Sequence]:
    counts.truncated += 1
    kept = row.turns
    while len(kept) > 1 and _length(kept) > max_length:
        kept = kept[1:]
        counts.exchanges_cut += 1
    last = kept[-1]
    if len(kept) > 1 or _length(kept) <= max_length:
        return [_joined(kept)]
    room = max_length - len(last.answer)
    if not row.is_text and room >= 0:
        return [_joined([last._replace(prompt=last.prompt[len(last.prompt) - room :])])]
    counts.answers_cut += 1
    return [_joined([last._replace(prompt=[], answer=[*last.answer[: max_length - 1], last.answer[-1]])])]


def _split(row: TokenizedRow, max_length: int, counts: Counts) -> list[Sequence]:
    if not row.is_text:
        raise DataError(
            f"{row.example.where}: {row.length} tokens, more than data.max_length {max_length}, and data.overlong "
            "split cuts plain text only: an answer cut off from its prompt teaches nothing. Choose drop or truncate."
        )
    counts.split += 1
    [turn] = row.turns
    starts = range(0, len(turn.answer) - 1, max_length - 1)  # each piece begins with the last token of the one before
    return [_joined([turn._replace(answer=turn.answer[start : start + max_length])]) for start in starts]


_POLICIES: dict[str, Callable[[TokenizedRow, int, Counts], list[Sequence]]] = {
    "drop": _drop,
    "error": _refuse,
    "truncate": _truncate,
    "split": _split,
}


def _count(counts: Counts, row: TokenizedRow, fitted: list[Sequence]) -> None:
    counts.rows += 1
    counts.kept += bool(fitted)
    counts.sequences += len(fitted)
    counts.tokens += sum(len(sequence.ids) for sequence in fitted)
    counts.trained_tokens += sum(len(sequence.labels) - sequence.labels.count(MASKED) for sequence in fitted)
    counts.answers_read += sum(not turn.learned for turn in row.turns)
    counts.answers_rewritten += max(len(row.example.exchanges) - len(row.turns), 0)
    counts.answer_tokens += sum(len(turn.answer) - 1 for turn in row.turns)
    counts.answer_bytes += sum(len(turn.text.encode()) for turn in row.turns)
    counts.answer_words += sum(len(turn.text.split()) for turn in row.turns)


def _arrow(sequences: list[Sequence], languages: list[str]) -> "pyarrow.Table":
    """Return sequences as 32-bit columns: about 8 bytes per token in all, while Python lists take 70."""
    import pyarrow

    kind = pyarrow.list_(pyarrow.int32())
    columns: dict[str, Any] = {
        "input_ids": pyarrow.array([sequence.ids for sequence in sequences], kind),
        "labels": pyarrow.array([sequence.labels for sequence in sequences], kind),
        "language": pyarrow.array(languages, pyarrow.string()),
    }
    return pyarrow.table(columns)


def dataset_of(table: "pyarrow.Table") -> "Dataset":
    """Make a dataset over a table; the same rows get the same fingerprint.

    `datasets` treats it as a table in memory even if it is mapped, so that derived datasets leave no files.
    """
    import hashlib

    from datasets import Dataset
    from datasets.table import InMemoryTable

    digest = hashlib.sha256()
    for column in table.columns:
        for chunk in column.chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
            digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
    return Dataset(InMemoryTable(table), fingerprint=digest.hexdigest()[:16])
