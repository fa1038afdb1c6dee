"""What became of the rows, by language: printed before training and kept in the manifest."""

from dataclasses import asdict, dataclass, field


@dataclass
class Counts:
    """Rows and tokens of one language."""

    rows: int = 0
    kept: int = 0
    dropped: int = 0
    split: int = 0
    """Kept rows that became several sequences."""
    truncated: int = 0
    """Kept rows that lost tokens, of the prompt or of the answer."""
    answers_cut: int = 0
    """Truncated rows whose answer or text lost its end."""
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add(self, other: "Counts") -> None:
        """Add another language's counts."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class EncodingReport:
    """Counts by language code."""

    languages: dict[str, Counts] = field(default_factory=dict)

    def of(self, language: str) -> Counts:
        """A language's counts, to be added to."""
        return self.languages.setdefault(language, Counts())

    @property
    def total(self) -> Counts:
        """The counts of all languages together."""
        total = Counts()
        for counts in self.languages.values():
            total.add(counts)
        return total

    def as_dict(self) -> dict[str, dict[str, int] | dict[str, dict[str, int]]]:
        """For the manifest: `total`, and `languages` in the order of their codes."""
        return {
            "total": asdict(self.total),
            "languages": {code: asdict(self.languages[code]) for code in sorted(self.languages)},
        }
