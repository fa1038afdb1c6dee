"""One source of rows, as a recipe's `data.sources` names it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    language: str | None = None
    language_column: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """The format's field name: the file's field name."""
    labels: Mapping[str, str] | None = None
    """Classification: a label as the file has it: the word for it."""
    source_language: str | None = None
    target_language: str | None = None
    instruction: str | None = None
    """Classification and translation: the request, with the format's fields in braces. Alpaca: every row's request."""

    @property
    def name(self) -> str:
        """Return the source's name in messages: its path, or its Hub id and split."""
        if self.path is not None:
            return self.path
        return f"{self.hub}{f'/{self.subset}' if self.subset else ''}[{self.split or 'train'}]"
