"""The declaration's texts: whole, parallel, found in an installation; what is damaged or unknown is said."""

import json
import lzma
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lola_ft.errors import DataError
from lola_ft.nano import declaration
from lola_ft.nano.declaration import (
    HELD_OUT_ARTICLES,
    find_declaration,
    load_declarations,
    parallel_articles,
    read_declarations,
)
from lola_ft.routing.language_families import find_language
from tests.conftest import Outcome, assert_says

ROOT = Path(__file__).parents[2]


def test_every_language_has_all_articles_in_its_own_script() -> None:
    declarations = load_declarations()
    assert len(declarations) > 190
    assert {"en", "sw", "sq", "ms", "no", "sr", "sr-Latn", "am", "ja"} <= declarations.keys()
    for tag, found in declarations.items():
        known = find_language(tag)
        assert known is not None, tag
        letters = [char for char in found.articles[0].text if char.isalpha()]
        script = Counter(unicodedata.name(char).split()[0] for char in letters).most_common(1)[0][0]
        expected = {"JAPANESE": "HIRAGANA", "JAVA": "JAVANESE"}.get(known.script.upper(), known.script.upper())
        assert expected.split()[0] == script, tag
        assert -90 <= found.latitude <= 90, tag
        assert -180 <= found.longitude <= 180, tag


def test_articles_are_parallel_and_some_are_held_out() -> None:
    found = parallel_articles(26, ["en", "sw"])
    assert found["en"].text.startswith("Everyone has the right to education.")
    assert found["sw"].text.startswith("Kila mtu ana haki ya kuelimishwa.")
    english = find_declaration("en")
    assert [
        number for number in range(1, 31) if english.articles[number - 1].paragraphs[0] in english.held_out_paragraphs
    ] == [*HELD_OUT_ARTICLES]
    assert english.training_paragraphs[0] == "Universal Declaration of Human Rights"
    assert not set(english.training_paragraphs) & set(english.held_out_paragraphs)
    everything = {*english.preamble, *(text for article in english.articles for text in article.paragraphs)}
    assert {*english.training_paragraphs[1:], *english.held_out_paragraphs} == everything


def test_variants_are_under_cldrs_codes() -> None:
    assert find_declaration("sq").training_paragraphs[1].startswith("Mbasi"), "`als` is Tosk Albanian in the source"
    assert find_declaration("sr-Latn").language == "sr"
    assert find_declaration("sr-Latn").name == find_declaration("sr").name == "Serbian"


UNKNOWN = {
    "near": ("sr-Lat", "sr-Lat: there is no declaration … Did you mean 'sr-Latn'? … ab, af"),
    "a name": ("Swahili", "Swahili: there is no declaration … Did you mean 'sw'?"),
    "no text": ("tlh", "tlh: there is no declaration in this language"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_tag_is_refused(case: str) -> None:
    tag, says = UNKNOWN[case]
    with pytest.raises(DataError) as error:
        find_declaration(tag)
    assert_says(str(error.value), says)


def test_an_unknown_article_is_refused() -> None:
    with pytest.raises(DataError, match="articles 1 to 30"):
        parallel_articles(31)


def row(tag: str = "sw", **changes: object) -> dict[str, object]:
    articles = [{"heading": f"Kifungu {number}", "paragraphs": ["Kila mtu."]} for number in range(1, 31)]
    known = {"tag": tag, "name": "Swahili", "latitude": -8, "longitude": 37, "title": "Taarifa", "preamble": []}
    return known | {"articles": articles} | changes


def packed(*rows: object) -> bytes:
    return lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


EMPTY = [{"heading": "1", "paragraphs": [" "]}, *[{"heading": "2", "paragraphs": ["x"]}] * 29]
DAMAGED = {
    "absent": (None, "texts are missing. … Install lola_ft again"),
    "cut": (packed(row(), row("de"))[:-30], "cannot be read … Install lola_ft again"),
    "not xz": (b"{}", "cannot be read"),
    "empty": (packed(), "holds no declaration"),
    "not JSON": (lzma.compress(b"{,}\n"), ":1: is not a declaration"),
    "a field lost": (packed(row(), {"tag": "de"}), ":2: is not a declaration (field 'articles' is missing)"),
    "an article lost": (packed(row(articles=[])), ":1: … sw: 0 articles, not 30"),
    "an empty article": (packed(row(articles=EMPTY)), ":1: … sw: article 1 is empty"),
    "twice": (packed(row(), row()), ":2: … sw occurs twice"),
    "no paragraphs": (packed(row(preamble="text")), ":1: … not a list of texts"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(case: str, tmp_path: Path) -> None:
    content, says = DAMAGED[case]
    file = tmp_path / "declaration.jsonl.xz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_declarations(file)
    assert_says(str(error.value), f"{file}{'' if says.startswith(':') else ': … '}{says}")


def test_a_damaged_package_gives_one_message(
    verb: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declaration, "DECLARATION_FILE", tmp_path / "gone.xz")
    load_declarations.cache_clear()
    outcome = verb("routing", "texts", "--out", str(tmp_path / "texts"), "--text", "declaration")
    load_declarations.cache_clear()
    assert outcome.code == 2
    assert_says(outcome.err, "gone.xz: the declaration's texts are missing")
    assert "Traceback" not in outcome.err


def test_the_verb_writes_a_file_per_language(verb: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    outcome = verb("routing", "texts", "--out", str(folder), "--text", "declaration", "--languages", "sw,sr-Latn")
    assert outcome.code == 0, outcome.err
    assert sorted(file.name for file in folder.iterdir()) == ["sr-Latn.txt", "sw.txt"]
    paragraphs = (folder / "sw.txt").read_text(encoding="utf-8").strip().split("\n\n")
    swahili = find_declaration("sw")
    assert paragraphs == [*swahili.training_paragraphs, *swahili.held_out_paragraphs]


REFUSED = {
    "an empty language": (["--languages", "sw,"], "--languages 'sw,': a language is empty … sw,rw"),
    "no language": (["--languages", ""], "--languages '': a language is empty"),
    "a language": (
        ["--text", "declaration", "--languages", "sw,tlh"],
        "--languages tlh: there is no text in this language. … sr-Latn, ss, st",
    ),
    "a kind": (["--text", "bible"], "--text bible: is unknown; choose one of all, names, declaration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_texts_and_languages_are_refused(case: str, verb: Callable[..., Outcome], tmp_path: Path) -> None:
    arguments, says = REFUSED[case]
    outcome = verb("routing", "texts", "--out", str(tmp_path / "texts"), *arguments)
    assert outcome.code == 2
    assert_says(outcome.err, says)
    assert not (tmp_path / "texts").exists()


@pytest.mark.slow
def test_a_wheel_has_the_texts_and_their_terms(tmp_path: Path) -> None:
    source = tmp_path / "source"  # setuptools builds inside the folder
    for folder in ("lola_ft", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lola_ft/nano/declaration.jsonl.xz", "lola_ft/nano/declaration.md"} <= set(names)
    terms = next(name for name in names if name.endswith("licenses/lola_ft/nano/declaration.md"))
    assert b"Titus Wormer" in zipfile.ZipFile(wheel).read(terms)
