"""A run's data: from the recipe's sources to encoded training and validation sets, with what became of each row."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerFast

from lola_ft.data import (
    BadRows,
    Encoded,
    EncodingReport,
    Example,
    Source,
    Template,
    commit_of,
    encode,
    files_of,
    read_examples,
    split_validation,
)
from lola_ft.recipe.schema import Data
from lola_ft.recipe.schema import Source as RecipeSource


@dataclass(frozen=True)
class RunData:
    """Encoded sets, the template they were made with, and what is worth remembering of the sources.

    Attributes:
        source_hashes: SHA-256 of every local file.
        commits: Hub datasets' commits by id, where the Hub could be asked.
        bad_rows: What was skipped; None where a bad row is an error.
    """

    train: Encoded
    validation: Encoded | None
    template: Template
    source_hashes: dict[str, str]
    commits: dict[str, str]
    bad_rows: BadRows | None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "sha256": self.source_hashes,
            "commits": self.commits,
            "bad_rows": self.bad_rows.as_dict() if self.bad_rows else None,
            "train": self.train.report.as_dict(),
            "validation": self.validation.report.as_dict() if self.validation else None,
        }


def prepare(data: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> RunData:
    """Read, split and encode.

    Raises:
        DataError: Naming file and line.
    """
    template = Template.load(data.template)
    bad_rows = BadRows() if data.on_bad_row == "skip" else None
    commits: dict[str, str] = {}

    def read(sources: list[RecipeSource]) -> Iterator[Example]:
        return read_examples([_pinned(source, commits) for source in sources], bad_rows, data.normalize)

    def encoded(examples: Iterable[Example]) -> Encoded:
        return encode(examples, tokenizer, template, data.max_length, data.overlong)

    examples = list(read(data.sources))
    validation = []
    if isinstance(data.validation, list):
        validation = list(read(data.validation))
    elif data.validation:
        examples, validation = split_validation(examples, data.validation, seed)
    train, held_out = encoded(examples), encoded(validation) if validation else None
    return RunData(train, held_out, template, _hashes(data), commits, bad_rows)


# Fates that are worth a column only when they befell a row.
_RARE = ("truncated", "answers_cut", "exchanges_cut", "split")


def data_table(report: EncodingReport, title: str, rows_shown: int = 12) -> Table:
    """Rows and tokens by language, the largest languages first; rare fates have a column if they happened."""
    total = report.total
    columns = ["rows", "kept", "dropped", *(name for name in _RARE if getattr(total, name)), "tokens", "trained_tokens"]
    table = Table(title=title, title_justify="left")
    table.add_column("language")
    for column in columns:
        table.add_column(column.replace("_tokens", "").replace("_", " "), justify="right")
    by_size = sorted(report.languages.items(), key=lambda item: (-item[1].rows, item[0]))
    for language, counts in by_size[:rows_shown]:
        table.add_row(language, *(f"{getattr(counts, column):,}" for column in columns))
    if len(by_size) > rows_shown:
        table.add_row(f"… {len(by_size) - rows_shown} more")
    table.add_section()
    table.add_row("all", *(f"{getattr(total, column):,}" for column in columns))
    return table


def _pinned(source: RecipeSource, commits: dict[str, str]) -> Source:
    """The source, at the commit that its revision stands for now."""
    keys = source.model_dump()
    if source.hub is not None and (commit := commit_of(source.hub, source.revision)):
        keys["revision"] = commits[source.hub] = commit
    return Source(**keys)


def _hashes(data: Data) -> dict[str, str]:
    sources = [*data.sources, *(data.validation if isinstance(data.validation, list) else [])]
    files = [file for source in sources if source.path is not None for file in files_of(source.path)]
    return {str(file): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
