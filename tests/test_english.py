"""The English that readers meet first: openings of docstrings, and words that the project does not use."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BARE_OPENINGS = ("What", "Whether", "Of", "As", "Here", "How", "Where", "Which")
ALLOWED_OPENINGS: dict[str, str] = {}
"""Docstrings that may open with such a word, and the reason: `path:line` of the string, why."""

UNUSED_WORDS = re.compile(r"\b(anew|whoever|mend|mends|mended)\b", re.IGNORECASE)
"""Write "again", "a person who" or the person's role, and "fix"."""


def files_of(*patterns: str) -> list[Path]:
    """Return the project's files of these patterns."""
    return sorted(file for pattern in patterns for file in ROOT.glob(pattern))


SOURCES = files_of("lola_ft/**/*.py", "finetune.py", "merge.py")
TEXTS = [
    *SOURCES,
    *files_of("lola_ft/**/*.jinja", "docs/**/*.md", "recipes/*.yaml", "recipes/*.json", "README.md", "CHANGELOG.md"),
]


def docstrings_in(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring of a module, class, function or attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def bare_openings_in(source: str) -> list[int]:
    """Return the lines of docstrings that open with a bare word."""
    opening = re.compile(rf"\s*({'|'.join(BARE_OPENINGS)})\b")
    return sorted(line for line, text in docstrings_in(source) if opening.match(text))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_a_docstring_opens_with_a_verb_or_a_noun(file: Path) -> None:
    found = [f"{name_of(file)}:{line}" for line in bare_openings_in(file.read_text(encoding="utf-8"))]
    wrong = [place for place in found if place not in ALLOWED_OPENINGS]
    assert not wrong, f"{', '.join(wrong)}: begin with a verb (Return, Check) or a noun, not {', '.join(BARE_OPENINGS)}"


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_plain_words_are_used(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    wrong = [f"{name_of(file)}:{number}" for number, line in enumerate(lines, 1) if UNUSED_WORDS.search(line)]
    assert not wrong, f"{', '.join(wrong)}: write again, a person's role, or fix"


def test_bare_openings_are_found_in_every_kind_of_docstring() -> None:
    source = '"""What."""\nclass A:\n    """A thing."""\n    def f(self):\n        """Whether."""\nB = 1\n"""Of B."""\n'
    assert bare_openings_in(source) == [1, 5, 7]
    assert not bare_openings_in('"""Whatever."""\nx = "What"\n')


def test_exceptions_exist_and_have_a_reason() -> None:
    assert all(ALLOWED_OPENINGS.values())
    lines = {f"{name_of(file)}:{line}" for file in SOURCES for line in bare_openings_in(file.read_text("utf-8"))}
    assert set(ALLOWED_OPENINGS) <= lines
    assert len(SOURCES) > 100
