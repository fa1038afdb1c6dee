"""A run's data: the recipe's sources become encoded training and validation sets, and a report on the rows."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from lola_ft.console import shown_progress
from lola_ft.data import (
    BadRows,
    ChatTemplate,
    Encoded,
    Example,
    Findings,
    LeakCheck,
    Mixed,
    MixSettings,
    PromptTemplate,
    Source,
    commit_of,
    encode,
    encode_judged,
    files_of,
    hold_out,
    load_template,
    mix,
    read_examples,
    without_duplicates,
)
from lola_ft.data.conversations import THINKING
from lola_ft.data.encoded_cache import Damaged, StoredRows, find_entry, keep, key_of, new_folder, table_file
from lola_ft.environment import usable_cores, version_of
from lola_ft.files import sha256_of
from lola_ft.recipe.allowed_values import OBJECTIVE_FORMATS
from lola_ft.recipe.schema import Data
from lola_ft.recipe.schema import Source as RecipeSource
from lola_ft.repo_id import is_commit

_DECIDES_NO_ROW = ("packing", "language_temperature", "max_per_language", "max_repeats")
_LIBRARIES = ("lola-ft", "tokenizers", "jinja2", "babel", "pyarrow", "datasets")
_MOST_THREADS = 4  # more threads would only wait: tokenising uses all cores by itself


@dataclass(frozen=True)
class RunData:
    """Encoded sets, the template they were made with, and facts about the sources.

    Attributes:
        source_hashes: SHA-256 of every local file.
        commits: Hub datasets' commits by name, as far as known.
        bad_rows: The rows skipped; None if a bad row is an error.
        duplicates: Number of duplicate training rows left out, by language; None if they are kept.
        leaks: The comparison with validation sources; None without such sources.
        findings: Facts about reading each source, by its name.
        note: A line about the cache, if it was used.
    """

    train: Encoded
    mix: Mixed
    validation: Encoded | None
    template: PromptTemplate
    source_hashes: dict[str, str]
    commits: dict[str, str]
    bad_rows: BadRows | None
    duplicates: Counter[str] | None
    leaks: LeakCheck | None
    findings: dict[str, Findings]
    note: str = ""

    def findings_lines(self) -> list[str]:
        """Return lines about reading the sources that a user should know."""
        return [line for name, found in self.findings.items() for line in found.lines(name)]

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's section on the data."""
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
    """Read, split, encode and mix the rows. Hub datasets are read at the revision in `data` (`pin` sets a commit).

    Raises:
        DataError: Rows or files cannot be used; the message names file and line.
    """
    template = load_template(data.template, tokenizer)
    files = [file for source in _all_sources(data) if source.path is not None for file in files_of(source.path)]
    hashes = {str(file): sha256_of(file) for file in files}
    key = None if _judged(data) else rows_key(data, tokenizer, template, hashes, seed)
    stored, note = (None, "") if key is None else _find(key)
    if stored is None:
        stored = _encode(data, tokenizer, template, seed, key)
    facts = stored.facts
    bad_rows = BadRows.restored(facts["bad_rows"]) if facts["bad_rows"] is not None else None
    duplicates = Counter(facts["duplicates"]) if facts["duplicates"] is not None else None
    leaks = LeakCheck([], **facts["leaks"]) if facts["leaks"] else None
    mixed = mix(stored.train, MixSettings(data.language_temperature, data.max_per_language, data.max_repeats), seed)
    findings = {name: Findings.restored(found) for name, found in facts["findings"].items()}
    if isinstance(template, ChatTemplate) and THINKING in template.source:
        for found in findings.values():
            found.take_out(f"[].{THINKING}")
    commits = {_source(source).name: source.revision for source in _all_sources(data) if source.hub and source.revision}
    return RunData(
        stored.train,
        mixed,
        stored.validation,
        template,
        hashes,
        commits,
        bad_rows,
        duplicates,
        leaks,
        findings,
        note,
    )


def _judged(data: Data) -> bool:
    """Tell whether the rows are judged answers. These are few, so they are encoded in memory and not cached."""
    return data.sources[0].format in OBJECTIVE_FORMATS.values()


def _find(key: str) -> tuple[StoredRows | None, str]:
    """Return the rows in the cache (None if missing or damaged), and a note for the user."""
    try:
        stored = find_entry(key)
    except Damaged as error:
        return None, f"Encoded rows in the cache were damaged ({error}) and are encoded again."
    return stored, "Encoded rows come from the cache." if stored else ""


def _encode(
    data: Data, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, seed: int, key: str | None
) -> StoredRows:
    """Read, split and encode the rows, and keep them in the cache under a key."""
    bad_rows = BadRows() if data.on_bad_row == "skip" else None
    findings = dict[str, Findings]()
    workers = min(usable_cores(), _MOST_THREADS)

    def read(sources: list[RecipeSource]) -> Iterator[Example]:
        return read_examples(map(_source, sources), bad_rows, data.normalize, data.learn, findings)

    with new_folder() as (folder, keepable), shown_progress("Encoding", None, "rows") as progress:

        def encoded(examples: Iterable[Example], side: str) -> Encoded:
            if _judged(data):
                return encode_judged(examples, tokenizer, template, data.max_length, data.overlong)
            file = table_file(folder, side)
            return encode(examples, tokenizer, template, data.max_length, data.overlong, file, workers, progress)

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
        train = encoded(examples, "train")  # reading the training rows also fills `held_out`
        validation = encoded(held_out, "validation") if held_out else None
        facts = {
            "bad_rows": bad_rows.stored() if bad_rows else None,
            "duplicates": None if duplicates is None else dict(duplicates),
            "leaks": leaks.as_dict() if leaks else None,
            "findings": {name: found.as_dict() for name, found in findings.items()},
        }
        rows = StoredRows(train, validation, facts)
        if key is not None and keepable:
            keep(folder, key, rows)
    return rows


def training_examples(data: Data) -> Iterator[Example]:
    """Read the training sources again, without bad rows but including rows held out for validation."""
    return read_examples(map(_source, data.sources), BadRows(), data.normalize, data.learn)


def pin(data: Data) -> Data:
    """Return the data section with each Hub dataset's branch or tag replaced by its commit, to be reproducible."""
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


def rows_key(
    data: Data, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, hashes: dict[str, str], seed: int
) -> str | None:
    """Return the cache key of the rows: a hash of everything that decides them; None if a source may change unseen."""
    if any(source.hub and not is_commit(source.revision) for source in _all_sources(data)):
        return None
    settings = {key: value for key, value in data.model_dump(mode="json").items() if key not in _DECIDES_NO_ROW}
    words = tokenizer.backend_tokenizer.to_str()
    return key_of(
        {
            "data": settings,
            "files": hashes,
            "template": template.source,
            "tokenizer": [hashlib.sha256(words.encode()).hexdigest(), tokenizer.eos_token_id, type(tokenizer).__name__],
            "seed": seed if isinstance(data.validation, float) and data.validation else None,
            "versions": [unicodedata.unidata_version, *map(version_of, _LIBRARIES)],
        }
    )
