"""Imports go one way: from the command line down to the errors."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lola_ft"
# A package may import from those of a higher number, and from itself.
LEVELS = {
    "__main__": 0,
    "cli": 1,
    "demo": 2,
    "doctor": 2,
    "training": 3,
    "merging": 3,
    "hub": 3,
    "nano": 3,
    "evaluation": 3,
    "generation": 4,
    "routing": 4,
    "planning": 4,
    "open_model": 5,
    "standalone": 5,
    "subject": 5.5,
    "baseline": 5.5,
    "adapters": 6,
    "data": 6,
    "card": 6,
    "quantization": 7,
    "checkpoints": 7.5,
    "families": 7.8,
    "model": 8,
    "kernels": 9,
    "recipe": 9,
    "environment": 10,
    "file_names": 10,
    "files": 10,
    "after_import": 10,
    "console": 10,
    "start": 10,
    "language_codes": 10,
    "lazy_attributes": 10,
    "memory": 10,
    "progress_bars": 10,
    "repo_id": 10,
    "row_formats": 10,
    "errors": 11,
    "__version__": 11,  # the number in `lola_ft/__init__.py`
}
# They are copied elsewhere and run there: tests/standalone holds what they may import.
SHIPPED = {PACKAGE / "standalone" / name for name in ("configuration_lola.py", "modeling_lola.py")}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py" and path not in SHIPPED)


def test_every_package_has_a_level() -> None:
    assert MODULES
    assert {part(path) for path in MODULES} <= set(LEVELS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    for imported in ours_imported_by(path):
        if imported != own:
            assert LEVELS[imported] > LEVELS[own], f"{own} imports {imported}, which is not below it"
        if imported == "recipe":
            assert own in ("cli", "training", "merging", "recipe", "demo"), f"{own} imports recipe"


def test_no_two_modules_need_each_other() -> None:
    """Nor through others, nor in a function. (A type's name alone is no need: a trainer's parts say whose they are.)"""
    left = {module_name(path): modules_imported_by(path) for path in MODULES if path.name != "__init__.py"}
    while True:
        imported = set[str]().union(*left.values())
        beside = [name for name in left if name not in imported or not left[name] & left.keys()]
        if not beside:
            break
        for name in beside:
            del left[name]
    assert not left, f"a circle of imports among {', '.join(sorted(left))}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def modules_imported_by(path: Path) -> set[str]:
    """The modules that a file imports, or imports something from, when it runs."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(inner) for block in for_types for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ours_imported_by(path: Path) -> set[str]:
    """The parts that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "lola_ft":
                names = [f"lola_ft.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lola_ft.")}
    return found
