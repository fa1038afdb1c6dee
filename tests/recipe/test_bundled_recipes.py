"""The recipes that come with lola_ft: found, named, copied so that they run, and known to editors."""

import json
import shlex
from pathlib import Path

import pytest

from lola_ft.errors import RecipeError
from lola_ft.recipe import bundled, load_recipe
from lola_ft.recipe.bundled import SCHEMA_FILE, bundled_recipes, copy_recipe, find_recipe, recipes_folder, schema_text
from lola_ft.recipe.keys import all_keys

NAMES = {
    "baseline_dense",
    "classification",
    "demo",
    "instruct",
    "instruct_mixtral",
    "instruct_multilingual",
    "instruct_olmoe",
    "instruct_qwen3_moe",
    "low_resource_text",
    "nli",
    "preference_dpo",
    "preference_kto",
    "question_answering",
    "summarisation",
    "translation",
}


def test_every_recipe_is_listed_with_its_purpose() -> None:
    assert set(bundled_recipes()) == NAMES
    for recipe in bundled_recipes().values():
        assert 20 < len(recipe.purpose) < 200, recipe.name
        assert "python" not in recipe.purpose
    assert find_recipe("nli").purpose.startswith("Natural language inference: does one sentence follow")
    assert find_recipe("nli.yaml") == find_recipe("nli")


def test_an_unknown_recipe_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"^there is no recipe 'translate'\. Did you mean 'translation'\?$"):
        find_recipe("translate")
    with pytest.raises(
        RecipeError, match=r"there is no recipe 'zzz'\. Choose one of baseline_dense, classification, demo,"
    ):
        find_recipe("zzz")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_copy_runs_where_it_was_copied(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = copy_recipe(name)
    recipe = load_recipe(f"recipes/{name}.yaml")
    local = {source.path for source in recipe.data.sources if source.path and source.path.startswith("recipes/")}
    local |= {word.rpartition("=")[2] for word in find_recipe(name).text.split() if "=recipes/data/" in word}
    assert local or name == "demo"
    assert all(Path(path).is_file() for path in local)
    assert {path.as_posix() for path in written} == {
        f"recipes/{name}.yaml",
        "recipes/schema.json",
        *local,
    }
    assert copy_recipe(name) == written  # the same again is no conflict


@pytest.mark.parametrize("out", ["mine", "a b/[c]", "ABSOLUTE"])
def test_a_copy_in_another_folder_runs_from_where_it_was_made(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = out.replace("ABSOLUTE", str(tmp_path / "there"))
    copied = copy_recipe("classification", out)[0]
    [source] = load_recipe(copied).data.sources
    assert source.path == f"{out}/recipes/data/classification_sample.jsonl"
    assert Path(source.path).is_file()
    assert copied.read_text().startswith(f"# lola-ft train {shlex.quote(str(copied))}\n")


def test_a_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    mine = tmp_path / "recipes" / "schema.json"
    mine.write_text("mine")
    with pytest.raises(RecipeError) as caught:
        copy_recipe("nli", tmp_path)
    assert str(caught.value) == f"{mine}: already exists and differs. Move it away, or choose another --out."
    assert mine.read_text() == "mine"
    assert list((tmp_path / "recipes").iterdir()) == [mine]


def test_an_installed_package_brings_its_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_recipe("question_answering", tmp_path / "lola_ft")
    monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "lola_ft")
    assert list(bundled_recipes()) == ["question_answering"]
    copied = copy_recipe("question_answering", tmp_path / "mine")
    assert [path.name for path in copied] == [
        "question_answering.yaml",
        "question_answering_sample.jsonl",
        "schema.json",
    ]


def test_a_package_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "lola_ft")
    with pytest.raises(
        RecipeError, match=r"the bundled recipes are missing\. Install lola_ft again, or run it in a checkout"
    ):
        bundled_recipes()


def test_the_committed_schema_is_the_recipes() -> None:
    """Refresh it with: lola-ft schema > recipes/schema.json"""
    assert (recipes_folder() / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()


def test_the_schema_knows_every_key_and_closes_every_section() -> None:
    schema = json.loads(schema_text())
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    known = {key for section in sections for key in section["properties"]}
    assert known == {key.rpartition(".")[2] for key in all_keys()}
    assert all(prop.get("description") for section in sections for prop in section["properties"].values())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_editors_find_the_schema(name: str) -> None:
    line = find_recipe(name).text.splitlines()[1]
    assert line == f"# yaml-language-server: $schema={SCHEMA_FILE}"


def test_an_overridden_place_takes_out_what_belongs_to_the_other_kind() -> None:
    nli = find_recipe("nli").path
    local = load_recipe(nli, ["data.sources.1.path=mine.csv"]).data.sources[1]
    assert (local.path, local.hub, local.subset, local.split, local.language) == ("mine.csv", None, None, None, "sw")
    hub = load_recipe(find_recipe("summarisation").path, ["data.sources.0.hub=a/b"]).data.sources[0]
    assert (hub.path, hub.hub, hub.split) == (None, "a/b", "train")
    with pytest.raises(RecipeError, match="give exactly one of `path`"):
        load_recipe(nli, ["data.sources.1.path=mine.csv", "data.sources.1.hub=a/b"])
