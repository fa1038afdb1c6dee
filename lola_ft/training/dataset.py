"""A run's data: from the recipe's sources to encoded training and validation sets, with what became of each row."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedTokenizerFast

from lola_ft.data import Encoded, EncodingReport, Source, Template, encode, read_examples, split_validation
from lola_ft.recipe.schema import Data
from lola_ft.recipe.schema import Source as RecipeSource


@dataclass(frozen=True)
class RunData:
    """Encoded sets, the template they were made with, and the sources' hashes."""

    train: Encoded
    validation: Encoded | None
    template: Template
    source_hashes: dict[str, str]


def prepare(data: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> RunData:
    """Read, split and encode.

    Raises:
        DataError: Naming file and line.
    """
    template = Template.load(data.template)
    examples = list(read_examples(_sources(data.sources)))
    validation = []
    if isinstance(data.validation, list):
        validation = list(read_examples(_sources(data.validation)))
    elif data.validation:
        examples, validation = split_validation(examples, data.validation, seed)
    train = encode(examples, tokenizer, template, data.max_length, data.overlong)
    held_out = encode(validation, tokenizer, template, data.max_length, data.overlong) if validation else None
    sources = [*data.sources, *(data.validation if isinstance(data.validation, list) else [])]
    hashes = {source.path: _sha256(source.path) for source in sources if source.path is not None}
    return RunData(train, held_out, template, hashes)


# Fates that are worth a column only when they befell a row.
_RARE = ("truncated", "answers_cut", "split")


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


def _sources(sources: list[RecipeSource]) -> list[Source]:
    return [Source(**source.model_dump()) for source in sources]


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
