"""The rows of an evaluation, read by the same readers and formats as training data."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lola_ft.data import Example, Row, Source, read_examples, read_rows
from lola_ft.data.example import prompt_fields
from lola_ft.data.fields import checked_text, found_fields
from lola_ft.data.formats import FORMATS, row_language
from lola_ft.data.text_files import UNITS
from lola_ft.errors import DataError, UserError
from lola_ft.evaluation.choice_task import Question
from lola_ft.row_formats import ROWS_OF_THEIR_OWN, kind_of_file

CHOICES = "choices"
"""A format only for evaluation: `prompt`, `choices` (texts) and `answer` (the right text, or its index from 0)."""
_CHOICE_FIELDS = ("prompt", "choices", "answer")


@dataclass(frozen=True)
class RowOptions:
    """Options that choose the rows, as given on the command line.

    Attributes:
        files: Files, folders or globs.
        languages: No code, one code for all files, or one code per file.
        fields: `standard=name` pairs.
        labels: `label=word` pairs, for format classification.
        max_rows: Number of first rows to read per language; None reads all.
    """

    files: Sequence[str]
    format: str | None = None
    languages: Sequence[str] = ()
    language_column: str | None = None
    fields: Sequence[str] = ()
    labels: Sequence[str] = ()
    instruction: str | None = None
    max_rows: int | None = None
    unit: str | None = None
    delimiter: str | None = None
    quoting: bool | None = None
    rows_under: str | None = None
    source_language: str | None = None
    target_language: str | None = None

    def sources(self) -> list[Source]:
        """Return one source per file; raises UserError for options that do not fit together."""
        if not self.files:
            raise UserError("Give held-out rows with --data FILE. Repeat the option for more files.")
        if self.languages and self.language_column:
            raise UserError("Give --language or --language-column, not both.")
        if not all(code.strip() for code in self.languages):
            raise UserError("--language is empty. Give a code such as sw, or leave it out.")
        if len(self.languages) not in (0, 1, len(self.files)):
            raise UserError(
                f"--language is given {len(self.languages)} times for {len(self.files)} files; give it once, or once "
                "per file."
            )
        languages = list(self.languages) * (len(self.files) if len(self.languages) == 1 else 1)
        return [self._source(file, languages[place] if languages else None) for place, file in enumerate(self.files)]

    def _source(self, file: str, language: str | None) -> Source:
        known = (*FORMATS, CHOICES)
        format = self.format or ("text" if kind_of_file(file) == ".txt" else None)
        if format not in known:
            given = f"--format '{format}' is unknown" if format else f"{file}: say what its rows are with --format"
            raise UserError(f"{given}; choose one of {', '.join(known)}.")
        fields = _pairs(self.fields, "--field")
        standard = _CHOICE_FIELDS if format == CHOICES else FORMATS[format].fields
        if unknown := [name for name in fields if name not in standard]:
            raise UserError(f"--field {unknown[0]}: format {format} has no such field; it has {', '.join(standard)}.")
        if self.unit is not None and self.unit not in UNITS:
            raise UserError(f"--unit {self.unit}: is unknown; choose one of {', '.join(UNITS)}.")
        if self.unit is not None and kind_of_file(file) in ROWS_OF_THEIR_OWN:
            raise UserError(f"--unit divides .txt files into rows; {file} has rows already. Leave it out.")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise UserError(f"--delimiter {self.delimiter!r}: give one character, such as ';'.")
        labels = _pairs(self.labels, "--label") or None
        for option, value, formats in (
            ("--label", labels, ("classification",)),
            ("--instruction", self.instruction, ("alpaca", "classification", "translation")),
            ("--source-language", self.source_language, ("translation",)),
            ("--target-language", self.target_language, ("translation",)),
        ):
            if value and format not in formats:
                raise UserError(f"{option} belongs to format {' or '.join(formats)}; {file} is {format}.")
        return Source(
            format,
            path=file,
            unit=self.unit,
            delimiter=self.delimiter,
            quoting=self.quoting,
            rows_under=self.rows_under,
            by_options=True,
            language=language,
            language_column=self.language_column,
            fields=fields,
            labels=labels,
            instruction=self.instruction,
            source_language=self.source_language,
            target_language=self.target_language,
        )


def read_for_scoring(options: RowOptions) -> list[Example]:
    """Return the rows to score or to answer; raises a DataError that names file and line."""
    sources = options.sources()
    if any(source.format == CHOICES for source in sources):
        raise UserError(f"--format {CHOICES} is for --task choice.")
    return _limited(read_examples(sources), options.max_rows, lambda example: example.language)


def read_questions(options: RowOptions) -> list[Question]:
    """Read the rows with their choices: the labels in format classification, each row's own in format choices."""
    questions = list[Question]()
    for source in options.sources():
        if source.format == CHOICES:
            questions += [_question(row, source) for row in read_rows(source)]
        elif source.format == "classification":
            questions += _classified(source)
        else:
            raise UserError(f"--task choice needs --format classification or {CHOICES}; this is {source.format}.")
    return _limited(questions, options.max_rows, lambda question: question.example.language)


def _classified(source: Source) -> Iterator[Question]:
    """Yield questions whose choices are the words of `labels` or, without `labels`, all labels in the file."""
    examples = list(read_examples([source]))
    words = list(dict.fromkeys(source.labels.values())) if source.labels else None
    choices = tuple(words or sorted({example.completion for example in examples}))
    if len(choices) < 2:
        raise DataError(f"{source.name}: all rows have the label '{choices[0]}'. Name the others with --label.")
    return (Question(example, choices, choices.index(example.completion)) for example in examples)


def _question(row: Row, source: Source) -> Question:
    prompt, choices, answer = (_field(row, source, name) for name in _CHOICE_FIELDS)
    names = {name: f"field '{source.fields.get(name, name)}'" for name in _CHOICE_FIELDS}
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{row.where}: {names['choices']} must be a list of at least two texts.")
    texts = tuple(checked_text(text, f"{names['choices']}[{place}]", row.where) for place, text in enumerate(choices))
    if len(set(texts)) < len(texts):
        raise DataError(f"{row.where}: {names['choices']} holds the same text twice.")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        right = answer
    elif answer in texts:
        right = texts.index(answer)
    else:
        raise DataError(
            f"{row.where}: {names['answer']} is {answer!r}; it must be one of the choices, or its index from 0."
        )
    fields = prompt_fields(checked_text(prompt, names["prompt"], row.where))
    return Question(Example(fields, texts[right], row_language(row, source), row.where), texts, right)


def _field(row: Row, source: Source, standard: str) -> Any:
    name = source.fields.get(standard, standard)
    if name not in row.fields:
        raise DataError(
            f"{row.where}: field '{name}' is missing (found: {found_fields(row)}). Map it with --field {standard}=…."
        )
    return row.fields[name]


T = TypeVar("T")


def _limited(rows: Iterable[T], most: int | None, language: Any) -> list[T]:
    """Return the first rows of each language."""
    seen, kept = Counter[str](), list[T]()
    for row in rows:
        seen[language(row)] += 1
        if most is None or seen[language(row)] <= most:
            kept.append(row)
    return kept


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    pairs = dict[str, str]()
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UserError(f"{option} '{text}': write it as name=value.")
        pairs[key] = value
    return pairs
