"""Rows as readers yield them, each with its place in a file; rows that cannot be used; the source of rows."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was found, and its place: `file:line`, `file:[index]` or `dataset[split]:[index]`.

    Attributes:
        read: Names of the fields that were looked at; `fields.py` adds to them.
    """

    fields: dict[str, Any]
    where: str
    read: set[str] = field(default_factory=set, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, while those after it can; the message names its place."""

    message: str


Rows = Iterator[Row | BadRow]


@dataclass
class Findings:
    """What a user should know of how a source was read.

    Attributes:
        rows: Rows that became examples.
        unused: How many of these hold something in a field that nothing looked at, by the field's name.
        notes: Choices that the reader made, each a sentence with its file.
    """

    rows: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def take_out(self, ending: str) -> None:
        """Take fields whose name ends so out of the unused ones: something uses them after all."""
        self.unused = Counter({name: count for name, count in self.unused.items() if not name.endswith(ending)})

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for `restored`."""
        return {"rows": self.rows, "unused": dict(self.unused), "notes": self.notes}

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> "Findings":
        """Rebuild findings from what `as_dict` returned."""
        return cls(stored["rows"], Counter(stored["unused"]), stored["notes"])

    def lines(self, name: str) -> list[str]:
        """Return the notes, and a line with the unused fields of the source `name`."""
        if not self.unused:
            return self.notes
        counts = ", ".join(f"{field} ({count:,} of {self.rows:,} rows)" for field, count in self.unused.most_common())
        return [*self.notes, f"{name}: fields not used: {counts}."]


@dataclass(frozen=True)
class Source:
    """One set of rows; the keys are those of a recipe's `data.sources`."""

    format: str
    path: str | None = None
    """A file, a folder (every file of a known kind in it, at any depth) or a glob such as `data/*.jsonl`."""
    hub: str | None = None
    subset: str | None = None
    split: str | None = None
    """Split of the Hub dataset; None is `train`."""
    revision: str | None = None
    streaming: bool = False
    limit: int | None = None
    """Rows that are read; None reads all."""
    unit: str | None = None
    """What a row of a .txt file is: `paragraph` (None too), `line` or `file`."""
    delimiter: str | None = None
    """The character between the cells of a .csv or .tsv file; None finds it."""
    quoting: bool | None = None
    """Whether a cell of a .csv or .tsv file may stand in quotation marks; None: in .csv."""
    rows_under: str | None = None
    """The key under which a .json file has the list of its rows; None finds it."""
    language: str | None = None
    language_column: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field name: the file's field name."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Conversations: a role's name in the file: system, user, assistant or tool."""
    join_turns: bool = False
    """Conversations: neighbouring turns of one role become one."""
    trim_last_turn: bool = False
    """Conversations: last turns that no answer follows are left out."""
    labels: Mapping[str, str] | None = None
    """Classification: a label as the file has it: the word for it."""
    source_language: str | None = None
    target_language: str | None = None
    instruction: str | None = None
    """Classification and translation: the request, with the format's fields in braces. Alpaca: every row's request."""

    by_options: bool = False
    """Whether the user gave this source by options of a verb; messages then advise options, not keys of a recipe."""

    def setting(self, key: str, value: str) -> str:
        """Return a setting of the source as the user would write it."""
        return f"`--{key.replace('_', '-')} {value}`" if self.by_options else f"`{key}: {value}`"

    def entry(self, key: str, name: str, value: str) -> str:
        """Return an entry of `fields` or `labels` as the user would write it."""
        return f"`--{key.removesuffix('s')} {name}={value}`" if self.by_options else f"`{key}: {{{name}: {value}}}`"

    @property
    def name(self) -> str:
        """Return the source's name in messages: its path, or its Hub id and split."""
        if self.path is not None:
            return self.path
        return f"{self.hub}{f'/{self.subset}' if self.subset else ''}[{self.split or 'train'}]"
