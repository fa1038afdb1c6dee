"""Tables that a run prints before its first step: the data kept and left out, and the weights trained."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lola_ft.console import Console, counted
from lola_ft.data import Counts, EncodingReport, Mixed
from lola_ft.families import architecture_of
from lola_ft.training.dataset import RunData

if TYPE_CHECKING:
    from peft import PeftModel

_ROWS_SHOWN = 12
_BAD_ROWS_SHOWN = 3


def print_report(data: RunData, console: Console) -> None:
    """Print tables of training and validation data and of the mix, and one line per kind of row left out."""
    if data.note:
        console.print(data.note)
    console.print(data_table(data.train.report, "Training data"))
    if data.mix.changed:
        console.print(mix_table(data.mix))
    if data.validation:
        console.print(data_table(data.validation.report, "Validation data"))
    for line in [*_left_out(data), *data.findings_lines()]:
        console.print(line)


def _left_out(data: RunData) -> Iterator[str]:
    if data.bad_rows and data.bad_rows.counts:
        skipped = counted(data.bad_rows.counts.total(), "row")
        yield f"Skipped {skipped} that cannot be used; the run's manifest.json lists them. The first:"
        yield from (f"  {message}" for message in data.bad_rows.messages[:_BAD_ROWS_SHOWN])
    if data.duplicates:
        yield f"Left out of training: {counted(data.duplicates.total(), 'row')} that repeat an earlier one."
    if data.leaks and data.leaks.rows:
        fate = "Left out of training" if data.leaks.action == "drop" else "Kept in training"
        yield f"{fate}: {counted(data.leaks.rows, 'row')} that are also validation rows."
    if data.leaks and data.leaks.prompts:
        kept = counted(data.leaks.prompts, "row")
        yield f"Kept in training: {kept} with the prompt of a validation row and another answer."


def mix_table(mixed: Mixed) -> Table:
    """Make a table of planned and actual examples and tokens per epoch, the largest languages first."""
    by_size = sorted(mixed.shares.items(), key=lambda item: (-item[1].examples, item[0]))
    everything = sum(share.examples for share in mixed.shares.values())
    headings = ["available", "planned", "per epoch", "share", "times each", "planned tokens", "tokens"]
    rows = {}
    for language, share in by_size:
        counts = [f"{share.available:,}", f"{share.planned:,.1f}", f"{share.examples:,}"]
        shares = [f"{share.examples / everything:.1%}", f"{share.examples / share.available:.2f}"]
        rows[language] = [*counts, *shares, f"{share.planned_tokens:,}", f"{share.tokens:,}"]
    return _language_table("Languages per epoch", headings, rows)


def _language_table(title: str, headings: list[str], rows: dict[str, list[str]]) -> Table:
    """Make a table of numbers by language, which shows the first dozen languages."""
    table = Table(title=title, title_justify="left")
    table.add_column("language", min_width=8)
    for heading in headings:
        table.add_column(heading, justify="right")
    for language, cells in list(rows.items())[:_ROWS_SHOWN]:
        table.add_row(escape(language), *cells)
    if len(rows) > _ROWS_SHOWN:
        table.add_row(f"… {len(rows) - _ROWS_SHOWN} more")
    return table


# Counts that get a column only if they are not 0.
_RARE = ("truncated", "answers_cut", "exchanges_cut", "split", "answers_read", "answers_rewritten")


def data_table(report: EncodingReport, title: str) -> Table:
    """Make a table of rows and tokens by language, the largest first; rare counts have a column only if not 0.

    The last two columns show the tokenizer's cost: tokens per byte and per word of the answers.
    """
    total = report.total
    columns = ["rows", "kept", "dropped", *(name for name in _RARE if getattr(total, name)), "tokens", "trained_tokens"]
    headings = [column.replace("_tokens", "").replace("_", " ") for column in columns]
    by_size = sorted(report.languages.items(), key=lambda item: (-item[1].rows, item[0]))
    rows = {language: _cells(counts, columns) for language, counts in by_size}
    table = _language_table(title, [*headings, "tokens per byte", "tokens per word"], rows)
    table.add_section()
    table.add_row("all", *_cells(total, columns))
    return table


def _cells(counts: Counts, columns: list[str]) -> list[str]:
    cost = [f"{counts.tokens_per_byte:.2f}", f"{counts.tokens_per_word:.1f}"]
    return [*(f"{getattr(counts, column):,}" for column in columns), *cost]


_BY_PART = {"trained_bias": "biases", "trainable_tokens_delta": "special tokens"}
"""Groups of parameters that an adapter holds besides LoRA, by PEFT's name of their kind."""


def count_trainable(model: "PeftModel") -> dict[str, tuple[int, int]]:
    """Return the numbers of trained tensors and parameters, by group."""
    architecture = architecture_of(model.config)
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _BY_PART.get(name.split(".")[-2]) or architecture.group_of(name)
            assert group is not None, f"{name} is trained and belongs to no group"
            tensors, parameters = counts[group]
            counts[group] = (tensors + 1, parameters + parameter.numel())
    return dict(counts)


def trainable_table(counts: dict[str, tuple[int, int]], ranks: dict[str, int], features: Sequence[str]) -> Table:
    """Make the table of trained groups with LoRA's ranks; the base's other groups are shown as frozen."""
    table = Table(title="Trained parameters", title_justify="left")
    table.add_column("group")
    table.add_column("how")
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for group in (*features, *(group for group in counts if group not in features)):
        tensors, parameters = counts.get(group, (0, 0))
        rank = ranks.get(group)
        how = f"LoRA rank {rank}" if rank else "tuned" if tensors else "frozen"
        table.add_row(group, how, f"{tensors:,}", f"{parameters:,}")
    table.add_section()
    table.add_row("all", "", *(f"{sum(column):,}" for column in zip(*counts.values(), strict=True)))
    return table
