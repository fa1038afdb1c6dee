"""Counts of rows kept, dropped and cut, by language. They are printed before training and kept in the manifest."""

from dataclasses import asdict, dataclass, field
from typing import Any

_WHERE_ANY = ("answers_read", "answers_rewritten")


@dataclass
class Counts:
    """Rows and tokens of one language."""

    rows: int = 0
    kept: int = 0
    dropped: int = 0
    split: int = 0
    """Kept rows that became several sequences."""
    truncated: int = 0
    """Kept rows that lost tokens of the prompt or of the answer."""
    answers_cut: int = 0
    """Truncated rows whose answer or text lost its end."""
    exchanges_cut: int = 0
    """Exchanges that truncation cut from the beginning of conversations."""
    answers_read: int = 0
    """Answers that are only read, not learned: `weight` 0, or data.learn last_answer."""
    answers_rewritten: int = 0
    """Earlier answers that the chat template rewrites when the conversation continues; only read, not learned."""
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    answer_tokens: int = 0
    """Tokens of all answers and texts, without EOS, before any row was dropped or cut."""
    answer_bytes: int = 0
    """Bytes in UTF-8 of the same answers and texts."""
    answer_words: int = 0
    """Words of the same answers and texts, divided at spaces; few in languages written without spaces."""

    @property
    def tokens_per_byte(self) -> float:
        """Return the tokens per byte of this language's answers and texts."""
        return round(self.answer_tokens / max(self.answer_bytes, 1), 3)

    @property
    def tokens_per_word(self) -> float:
        """Return the tokens per word of this language's answers and texts."""
        return round(self.answer_tokens / max(self.answer_words, 1), 3)

    def as_dict(self) -> dict[str, int | float]:
        """Return plain numbers, including tokens per byte and per word.

        The counts of answers that are only read appear only if they are not 0. Runs of earlier versions did not have
        these counts, so their data facts stay equal.
        """
        kept = {name: value for name, value in asdict(self).items() if value or name not in _WHERE_ANY}
        return kept | {"tokens_per_byte": self.tokens_per_byte, "tokens_per_word": self.tokens_per_word}

    def add(self, other: "Counts") -> None:
        """Add another language's counts."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class EncodingReport:
    """Counts by language code."""

    languages: dict[str, Counts] = field(default_factory=dict)

    def of(self, language: str) -> Counts:
        """Return a language's counts, which the caller may increase."""
        return self.languages.setdefault(language, Counts())

    @property
    def total(self) -> Counts:
        """The counts of all languages together."""
        total = Counts()
        for counts in self.languages.values():
            total.add(counts)
        return total

    def add(self, other: "EncodingReport") -> None:
        """Add the counts of further rows."""
        for language, counts in other.languages.items():
            self.of(language).add(counts)

    def as_dict(self) -> dict[str, Any]:
        """Return the facts for the manifest: `total`, and `languages` in the order of their codes."""
        return {
            "total": self.total.as_dict(),
            "languages": {code: self.languages[code].as_dict() for code in sorted(self.languages)},
        }
