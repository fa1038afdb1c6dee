"""The types of rows: a row with its place in a file, a row that cannot be used, and the source of rows."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """A row's fields, unchanged, and its place: `file:line`, `file:[index]` or `dataset[split]:[index]`.

    Attributes:
        read: Names of the fields that were read; `fields.py` adds them.
    """

    fields: dict[str, Any]
    where: str
    read: set[str] = field(default_factory=set, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read although later rows can; the message names its place."""

    message: str


Rows = Iterator[Row | BadRow]


@dataclass
class Findings:
    """Facts about reading a source that a user should know.

    Attributes:
        rows: Rows that became examples.
        unused: Number of rows with a value in a field that was not read, by the field's name.
        notes: Choices that the reader made, each a sentence that names the file.
    """

    rows: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a sentence unless it is noted already."""
        if text not in self.notes:
            self.notes.append(text)

    def take_out(self, ending: str) -> None:
        """Remove fields whose name has this ending from the unused fields: they are used elsewhere."""
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
    """One source of rows, with the keys of a recipe's `data.sources`."""

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
    """Most rows to read; None reads all."""
    unit: str | None = None
    """The unit of a .txt file that is one row: `paragraph` (also None), `line` or `file`."""
    delimiter: str | None = None
    """The character between the cells of a .csv or .tsv file; None finds it."""
    quoting: bool | None = None
    """Cells may be in quotation marks; None means True for .csv and False for .tsv."""
    rows_under: str | None = None
    """The key of a .json file that holds the list of rows; None finds it."""
    language: str | None = None
    language_column: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """From the format's field names to the file's field names."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Conversations: from role names in the file to system, user, assistant or tool."""
    join_turns: bool = False
    """Conversations: consecutive turns of the same role are joined."""
    trim_last_turn: bool = False
    """Conversations: turns at the end that no answer follows are left out."""
    labels: Mapping[str, str] | None = None
    """Classification: from labels in the file to the words that answers use."""
    source_language: str | None = None
    target_language: str | None = None
    instruction: str | None = None
    """The instruction of every row; in classification and translation with the format's fields in braces."""

    by_options: bool = False
    """The source comes from a verb's options, so messages recommend options and not recipe keys."""

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
