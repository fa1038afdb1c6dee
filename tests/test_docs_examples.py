"""Every command, every piece of a recipe and all Python in README and docs is understood as it stands there.

`tests/test_docs_run.py` runs what needs neither the Hub nor a GPU.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from ruamel.yaml import YAML

from lola_ft.cli import app
from lola_ft.recipe import load_recipe
from tests.code_blocks import BLOCKS, ROOT, Block

COMMANDS = [(block, words) for block in BLOCKS for words in block.commands]
RECIPES = [block for block in BLOCKS if block.is_yaml]
PYTHON = [block for block in BLOCKS if block.is_python]
SYNOPSIS = re.compile(r"\[--|\bRECIPE\b|\bBASE\b|\bBASE\|")
"""Commands with placeholders in capitals or options in brackets say what may be written; they are no command."""
OTHER_PROGRAMS = {
    "accelerate": "a launcher of several processes; tests/training/test_processes.py starts them",
    "torchrun": "the same",
    "hf": "the Hub's own command",
    "pip": "tests/test_wheel.py installs the package",
    "echo": "a text for the command behind it",
}


def named(example: tuple[Block, list[str]]) -> str:
    return f"{example[0]}-{' '.join(example[1])[:60]}"


@pytest.mark.parametrize("example", COMMANDS, ids=named)
def test_a_command_is_one_that_there_is(example: tuple[Block, list[str]]) -> None:
    _, words = example
    if SYNOPSIS.search(" ".join(words)):
        return
    program, *arguments = words
    if "|" in arguments:  # what stands behind the pipe
        program, *arguments = arguments[arguments.index("|") + 1 :]
    if program == "make":
        targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert arguments[0] in " ".join(targets).split()
    elif program == "lola-ft":
        parse(arguments)
    elif arguments[:1] in (["finetune.py"], ["merge.py"]):
        parse([{"finetune.py": "train", "merge.py": "merge"}[arguments[0]], *arguments[1:]])
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        unknown = [option for option in arguments[1:] if option.startswith("--") and f'"{option}"' not in script]
        assert not unknown, f"{arguments[0]} has no {unknown}"
    elif program == "python":
        assert arguments[:2] == ["-m", "pytest"]
        assert (ROOT / arguments[2]).exists()
    else:
        assert program in OTHER_PROGRAMS


def parse(arguments: list[str]) -> None:
    """Parse a verb and its options as the command line does, load its recipe, and run nothing."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("lola-ft", list(arguments))
    while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None, f"there is no verb {name}"
        context = command.make_context(name, list(rest), parent=context)
    if recipe := context.params.get("recipe"):
        load_recipe(ROOT / recipe, context.params.get("overrides") or [])


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_a_piece_of_a_recipe_is_valid(block: Block, tmp_path: Path) -> None:
    """What a piece leaves out is put around it; `…` stands for something that is left out."""
    given = without_ellipses(YAML(typ="safe").load(block.text))
    objective = given.get("objective", "dpo" if block.document == "docs/preference.md" else "sft")
    data = {"sources": SOURCES[objective], "validation": 0.1}
    whole = {"objective": objective, "base": {"model": "base"}, "data": data, "output": "out"}
    merged = {key: merged_with(whole.get(key), given.get(key)) for key in whole | given}
    merged["adapter"] = merged.get("adapter") or {"attention": {"rank": 8}}
    if not any(group in merged["adapter"] for group in ("attention", "mlp", "experts", "continue_from")):
        merged["adapter"]["attention"] = {"rank": 8}
    file = tmp_path / "recipe.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML().dump(merged, stream)
    load_recipe(file)


SOURCES = {
    "sft": [{"path": "rows.jsonl", "format": "alpaca", "language": "sw"}],
    "dpo": [{"path": "rows.jsonl", "format": "preference", "language": "sw"}],
    "kto": [{"path": "rows.jsonl", "format": "unpaired_preference", "language": "sw"}],
}


def without_ellipses(value: Any) -> Any:
    """Return YAML's value without what only stands for something left out."""
    if isinstance(value, dict):
        return {key: without_ellipses(inner) for key, inner in value.items() if inner != "…"}
    return value


def merged_with(outer: Any, inner: Any) -> Any:
    """Return a section with its keys in place of those around it."""
    if isinstance(outer, dict) and isinstance(inner, dict):
        return outer | inner
    return outer if inner is None else inner


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_names_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text.replace("…", "..."))
    for module, name in imported(tree):
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Give each name of ours that is imported or used as an attribute of `lola_ft`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("lola_ft", "transformers")):
            yield from ((node.module, name.name) for name in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lola_ft":
            yield "lola_ft", node.attr


def test_blocks_are_found() -> None:
    """The patterns still see what documents hold."""
    assert len(COMMANDS) > 80
    assert len(RECIPES) > 15
    assert len(PYTHON) > 5
    documents = {block.document for block in BLOCKS}
    assert {"README.md", "docs/index.md", "docs/data.md", "docs/evaluation.md"} <= documents
    assert ["make", "test"] in [words for block, words in COMMANDS if block.document == "README.md"]


def test_fences_have_a_language() -> None:
    """A fence without one is not highlighted; the README has fences only, which can be copied with one click."""
    assert [str(block) for block in BLOCKS if block.language == "bare"] == []
    assert [str(block) for block in BLOCKS if block.language == "" and block.document == "README.md"] == []
