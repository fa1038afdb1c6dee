"""Training uses only those insides of transformers and TRL that docs/internals.md lists."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from lola_ft.training.trainers.preference import DpoTrainer, KtoTrainer, PreferenceTrainer
from lola_ft.training.trainers.run_trainer import RunTrainer
from lola_ft.training.trainers.sft import SftTrainer

REPOSITORY = Path(__file__).parents[3]
UPSTREAM = {SftTrainer: SFTTrainer, DpoTrainer: DPOTrainer, KtoTrainer: KTOTrainer}
OURS = (RunTrainer, PreferenceTrainer, *UPSTREAM)
_PRIVATE = re.compile(r"_[a-z]\w*")


def documented(heading: str) -> list[list[str]]:
    """The cells of the table below a heading row, in docs/internals.md."""
    lines = (REPOSITORY / "docs" / "internals.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_overridden_methods_are_those_of_the_table() -> None:
    upstream = [kind for own in UPSTREAM.values() for kind in own.__mro__]
    overridden = {
        (name, kind.__name__)
        for kind in OURS
        for name in vars(kind)
        if _PRIVATE.fullmatch(name) and any(name in vars(theirs) for theirs in upstream)
    }
    table = documented("private method")
    assert overridden == {(*names_in(name), *names_in(where)) for name, where, _ in table}
    assert all(reason for *_, reason in table)


@pytest.mark.parametrize("kind", UPSTREAM)
def test_upstream_still_has_what_is_overridden(kind: type[RunTrainer]) -> None:
    """A method that upstream renames would silently no longer be called."""
    for name, where, _ in documented("private method"):
        [method], [own] = names_in(name), names_in(where)
        if own in {base.__name__ for base in kind.__mro__}:
            assert hasattr(UPSTREAM[kind], method), f"{UPSTREAM[kind].__name__} has no {method} any more"
            assert getattr(kind, method).__qualname__ == f"{own}.{method}"


def test_private_names_of_others_are_those_of_the_table() -> None:
    """Names of a trainer that its class defines itself are ours; so are those that a class keeps on `self`."""
    own = {name for kind in OURS for name in vars(kind)}
    used: set[str] = set()
    for path in sorted((REPOSITORY / "lola_ft" / "training").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in tree.body:
            kept = _kept_on_self(scope) if isinstance(scope, ast.ClassDef) else set()
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute) and _PRIVATE.fullmatch(node.attr):
                    on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                    on_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
                    if not (on_self and node.attr in kept) and not on_super and node.attr not in own:
                        used.add(node.attr)
    assert used == {name for cell, *_ in documented("private name") for name in names_in(cell)}


def _kept_on_self(scope: ast.ClassDef) -> set[str]:
    """List the names that a class defines, or sets on `self`."""
    names = {node.name for node in scope.body if isinstance(node, ast.FunctionDef)}
    names |= {ast.unparse(node.target) for node in scope.body if isinstance(node, ast.AnnAssign)}
    stored = [node for node in ast.walk(scope) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return names | {node.attr for node in stored if ast.unparse(node.value) == "self"}


def test_the_loop_still_keeps_its_sums() -> None:
    """Checkpoints hold these, and what is put back must be what the loop goes on with."""
    loop = inspect.getsource(inspect.getmodule(Trainer))
    for name in names_in(documented("private name")[0][0]):
        assert f"self.{name} = " in loop, f"transformers' Trainer no longer sets {name}"
    assert hasattr(Trainer, "_evaluate")
    assert hasattr(Trainer, "_prepare_inputs")
