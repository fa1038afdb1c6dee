"""The code blocks of README and docs, and the commands, YAML and Python in them."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMANDS = ("accelerate", "echo", "hf", "lola-ft", "make", "pip", "python", "torchrun")
_KEYS = ("adapter", "base", "data", "guards", "hub", "objective", "output", "router", "train")
"""A block that begins with one of a recipe's sections, and `:`, is YAML, whether or not its fence says so."""


@dataclass(frozen=True)
class Block:
    """A block of code: its document's path from the root, its first line, its language and its text.

    The language is "" of an indented block, "bare" of a fence without one, and "file" of one that shows a piece of a
    file (which tests/test_docs.py compares).
    """

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_yaml(self) -> bool:
        """True for a recipe, or a part of one."""
        first = next((line for line in self.text.splitlines() if not line.startswith("#")), "")
        return self.language in ("", "yaml") and first.partition(":")[0] in _KEYS and ":" in first

    @property
    def is_python(self) -> bool:
        """True for Python that may be run."""
        return self.language == "python" or (
            self.language == "" and re.match(r"(import|from) \w", self.text) is not None
        )

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line; a comment behind it is left out."""
        if self.language not in ("", "bash"):
            return []
        lines = [line for line in self.text.splitlines() if line.split(" ")[0] in _COMMANDS]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(document: Path) -> list[Block]:
    """Return the fenced and the indented blocks of a Markdown file, in its order."""
    name = document.relative_to(ROOT).as_posix()
    found, block, fence, language, start = list[Block](), list[str](), "", "", 0
    before = ""

    def end() -> None:
        if text := textwrap.dedent("\n".join(block)).strip("\n"):
            found.append(Block(name, start, language, text))
        block.clear()

    for number, line in enumerate([*document.read_text(encoding="utf-8").splitlines(), ""], start=1):
        opening = re.match(r"( *)(`{3,})(\w*)", line)
        if fence:
            if line.strip() == fence:
                end()
                fence, language = "", ""
            else:
                block.append(line)
        elif opening:
            end()
            fence, language, start = opening[2], "file" if "title=" in line else opening[3] or "bare", number
        elif line.startswith("    ") and (block or not (before.strip() or re.match(r" +([-*]|\d+\.) ", line))):
            start = start if block else number
            block.append(line)
        elif line.strip() or not block:
            end()
        else:
            block.append(line)
        before = line
    end()
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
