"""A run's data: from the recipe's sources to encoded training and validation sets, with what became of each row."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lola_ft.data import (
    BadRows,
    Encoded,
    Example,
    LeakCheck,
    Mixed,
    MixSettings,
    Source,
    Template,
    commit_of,
    encode,
    encode_judged,
    files_of,
    hold_out,
    mix,
    read_examples,
    without_duplicates,
)
from lola_ft.recipe.names import OBJECTIVE_FORMATS
from lola_ft.recipe.schema import Data
from lola_ft.recipe.schema import Source as RecipeSource


@dataclass(frozen=True)
class RunData:
    """Encoded sets, the template they were made with, and what is worth remembering of the sources.

    Attributes:
        source_hashes: SHA-256 of every local file.
        commits: Hub datasets' commits by name, where they are known.
        bad_rows: What was skipped; None where a bad row is an error.
        duplicates: Training rows left out, by language; None where they stay.
        leaks: The comparison with validation sources; None without such.
    """

    train: Encoded
    mix: Mixed
    validation: Encoded | None
    template: Template
    source_hashes: dict[str, str]
    commits: dict[str, str]
    bad_rows: BadRows | None
    duplicates: Counter[str] | None
    leaks: LeakCheck | None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "sha256": self.source_hashes,
            "commits": self.commits,
            "bad_rows": self.bad_rows.as_dict() if self.bad_rows else None,
            "duplicates": None if self.duplicates is None else dict(self.duplicates),
            "leakage": self.leaks.as_dict() if self.leaks else None,
            "mix": self.mix.as_dict(),
            "train": self.train.report.as_dict(),
            "validation": self.validation.report.as_dict() if self.validation else None,
        }


def prepare(data: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> RunData:
    """Read, split, encode and mix.

    Args:
        data: Hub datasets in it are read at the revision it names; `pin` makes that a commit.

    Raises:
        DataError: Naming file and line.
    """
    template = Template.load(data.template)
    bad_rows = BadRows() if data.on_bad_row == "skip" else None

    def read(sources: list[RecipeSource]) -> Iterator[Example]:
        return read_examples(map(_source, sources), bad_rows, data.normalize)

    judged = data.sources[0].format in OBJECTIVE_FORMATS.values()

    def encoded(examples: Iterable[Example]) -> Encoded:
        return (encode_judged if judged else encode)(examples, tokenizer, template, data.max_length, data.overlong)

    held_out, leaks = list[Example](), None
    duplicates = Counter[str]() if data.deduplicate else None
    examples = read(data.sources)
    if duplicates is not None:
        examples = without_duplicates(examples, duplicates)
    if isinstance(data.validation, list):
        held_out = list(read(data.validation))
        leaks = LeakCheck(held_out, data.leakage)
        examples = leaks.checked(examples)
    elif data.validation:
        examples = hold_out(examples, data.validation, seed, held_out)
    train = encoded(examples)  # reads the rows as it goes; what is held out is known only afterwards
    validation = encoded(held_out) if held_out else None
    mixed = mix(train, MixSettings(data.language_temperature, data.max_per_language, data.max_repeats), seed)
    return RunData(train, mixed, validation, template, _hashes(data), _commits(data), bad_rows, duplicates, leaks)


def training_examples(data: Data) -> Iterator[Example]:
    """The rows of the training sources once more, bad ones left out; what is held out is among them."""
    return read_examples(map(_source, data.sources), BadRows(), data.normalize)


def pin(data: Data) -> Data:
    """The data section with the commit in place of each Hub dataset's branch or tag, so that it can be run again."""
    pinned: dict[str, Any] = {"sources": list(map(_pinned, data.sources))}
    if isinstance(data.validation, list):
        pinned["validation"] = list(map(_pinned, data.validation))
    return data.model_copy(update=pinned)


def _pinned(source: RecipeSource) -> RecipeSource:
    commit = None if source.hub is None else commit_of(source.hub, source.revision)
    return source if commit is None else source.model_copy(update={"revision": commit})


def _source(source: RecipeSource) -> Source:
    return Source(**source.model_dump())


def _all_sources(data: Data) -> list[RecipeSource]:
    return [*data.sources, *(data.validation if isinstance(data.validation, list) else [])]


def _commits(data: Data) -> dict[str, str]:
    return {_source(source).name: source.revision for source in _all_sources(data) if source.hub and source.revision}


def _hashes(data: Data) -> dict[str, str]:
    files = [file for source in _all_sources(data) if source.path is not None for file in files_of(source.path)]
    return {str(file): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
