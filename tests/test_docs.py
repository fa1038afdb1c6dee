"""Paths that the documents name exist, every page is on the site, and CONTRIBUTING.md's map of the package is whole."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lola_ft.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "CONTRIBUTING.md", ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
PLACES = ("", "lola_ft", "docs")
"""Folders below the root that a path may be relative to; a link in a document is relative to the document."""

FOLDERS_OF_OUTPUT = ("runs/", "reports/", ".cache/", "nano-report/")
"""Beginnings of folders that commands make when a reader runs them."""
EXAMPLES = ("recipes/sw.yaml",)
"""A reader's own files, in examples of messages."""
PARTS_OF_OUTPUT = ("adapter/", "checkpoints/", "merged/", "start/")
"""Folders inside a run."""
MADE_FOR_THE_SITE = ("changelog.md",)
"""Pages that `docs/site_pages.py` makes of files elsewhere."""
NEIGHBOURS = {
    "docs/internals.md": "lola_ft/kernels",  # the section on experts names the folder once, then its files
    "docs/publishing.md": "lola_ft/standalone",  # names the two files that lie beside the weights
    "docs/performance.md": "benchmarks",  # its first line says that all scripts are there
    "docs/add_a_family.md": "lola_ft/families",  # its table names files beside the one that it follows
}
"""A folder whose files a document names without it."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_paths_exist(document: Path) -> None:
    name = str(document.relative_to(ROOT))
    places = [*PLACES, *([NEIGHBOURS[name]] if name in NEIGHBOURS else [])]
    missing = [path for path in paths_in(document) if not any((ROOT / place / path).exists() for place in places)]
    assert not missing, f"{name} names {', '.join(missing)}: not there. Was it renamed?"


def test_the_map_names_every_module_and_nothing_else() -> None:
    """Every folder and single file of the package is on the map, and every file on the map exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text.partition("    lola_ft/\n")[2].partition("    benchmarks/")[0]
    named = set(re.findall(r"\b\w+\.py\b", house)) | set(re.findall(r"^      (\w+)/", house, re.MULTILINE))
    package = ROOT / "lola_ft"
    rooms = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    missing = rooms - named - {"__init__.py", "__main__.py"}
    assert not missing, f"CONTRIBUTING.md lacks {missing}"
    files = {path.name for path in package.rglob("*.py")}
    assert named <= rooms | files, f"CONTRIBUTING.md names {named - rooms - files}"


def test_paths_in_documents_are_recognised() -> None:
    """The patterns still see what documents name."""
    assert "lola_ft/families/gpt2.py" in paths_in(ROOT / "docs" / "families.md")
    assert "training/trainers/" in paths_in(ROOT / "CONTRIBUTING.md")
    assert "docs/resume.md" in paths_in(ROOT / "README.md")


def paths_in(document: Path) -> list[str]:
    """Return the Python files, documents and folders in backticks, recipes in commands, and targets of links."""
    text = document.read_text(encoding="utf-8")
    in_backticks = re.findall(r"`([\w./-]+(?:\.(?:py|md|csv)|/))`", text)
    in_commands = re.findall(r"\b((?:benchmarks|recipes|tests)/[\w./-]+\.(?:py|yaml|jsonl))", text)
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    found = dict.fromkeys([*in_backticks, *in_commands, *links])
    exceptions = (*PARTS_OF_OUTPUT, *EXAMPLES, *MADE_FOR_THE_SITE)
    return [path for path in found if path not in exceptions and not path.startswith(FOLDERS_OF_OUTPUT)]


def test_every_family_has_a_line_in_the_table() -> None:
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    listed = {line.split("|")[2].strip().strip("`") for line in lines if line.startswith("| ") and line.count("|") > 6}
    assert listed - {"`model_type`", "model_type"} == set(FAMILIES)


def test_every_page_is_in_the_sites_navigation() -> None:
    navigation = YAML(typ="safe").load(ROOT / "mkdocs.yml")["nav"]
    named = set(re.findall(r"'(\w+\.md)'", str(navigation)))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert named == pages | set(MADE_FOR_THE_SITE)


def test_code_that_a_page_shows_of_a_file_is_in_that_file() -> None:
    """The worked example of a family is the family's file, line by line."""
    page = (ROOT / "docs" / "add_a_family.md").read_text(encoding="utf-8")
    shown = re.findall(r'```python title="([^"]+)"\n(.*?)```', page, re.DOTALL)
    assert {file for file, _ in shown} >= {"lola_ft/families/olmoe.py", "tests/families/moe.py"}
    for file, code in shown:
        assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file} no longer has:\n{code}"
    whole = (ROOT / "lola_ft/families/olmoe.py").read_text(encoding="utf-8")
    parts = [code.strip() for file, code in shown if file == "lola_ft/families/olmoe.py"]
    assert "\n\n\n".join(parts) + "\n" == whole
