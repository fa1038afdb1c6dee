"""The package as a wheel: built from a copy of the checkout, installed elsewhere, and used there."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lola_ft
from lola_ft.recipe.bundled import bundled_recipes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LARGEST = 2_000_000
"""Bytes; most of it is the declaration of human rights in 197 languages and scripts."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools builds inside the folder
    for name in ("lola_ft", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """An environment with the wheel, in which other packages are those of this one; runs a command there."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, "--no-compile", str(wheel)], check=True)
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n", encoding="utf-8")
    work = folder / "work"
    work.mkdir()

    def run(program: str, *arguments: str | Path, **environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
        command = [str(folder / "venv" / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=work, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_holds_recipes_templates_schema_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"lola_ft/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.*")}
    assert len(recipes) > 20
    assert recipes <= names
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lola_ft").rglob("*.*")}
    data = {name for name in package if not re.search(r"\.py$|\.pyc$|__pycache__", name)}
    assert {"lola_ft/nano/declaration.jsonl.xz", "lola_ft/routing/report.html.jinja"} <= data
    assert {"lola_ft/training/reports/run_page.html.jinja", "lola_ft/data/templates/alpaca.jinja"} <= data
    assert data <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]
    assert wheel.stat().st_size < LARGEST
    terms = next(name for name in names if name.endswith("licenses/lola_ft/nano/declaration.md"))
    assert b"Titus Wormer" in zipfile.ZipFile(wheel).read(terms)


def test_the_version_stands_in_one_place(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == lola_ft.__version__
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+) \(", text, re.MULTILINE)[1] == lola_ft.__version__  # type: ignore[index]


def test_the_installed_package_is_the_wheels(installed: Callable[..., str]) -> None:
    where = Path(installed("python", "-c", "import lola_ft; print(lola_ft.__file__)").strip())
    assert "site-packages" in where.parts
    assert ROOT not in where.parents


def test_its_verbs_work_outside_the_checkout(installed: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    assert installed("lola-ft", "--version") == f"lola-ft {lola_ft.__version__}\n"
    assert "lola-ft recipes list" in installed("lola-ft")
    listed = installed("lola-ft", "recipes", "list")
    assert [line.split()[0] for line in listed.splitlines()] == list(bundled_recipes())
    schema = installed("lola-ft", "schema")
    assert json.loads(schema) == json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))
    copied = installed("lola-ft", "recipes", "copy", "classification", "--out", tmp_path).splitlines()
    assert {Path(path).name for path in copied} >= {"classification.yaml", "classification_sample.jsonl"}
    recipe = next(path for path in copied if path.endswith(".yaml"))
    changes = [f"base.model={tiny_base}", "data.max_length=128", "data.overlong=truncate"]
    cache: dict[str, Any] = {"LOLA_FT_CACHE": str(tmp_path / "cache")}
    assert "Training data" in installed("lola-ft", "preview", recipe, *changes, **cache)
    assert "It fits" in installed("lola-ft", "plan", recipe, *changes, "--gpu", "8GB", **cache)
