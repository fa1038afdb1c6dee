"""A recipe's data section carried out: what is printed, what the manifest keeps, what is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lola_ft.data import Template
from lola_ft.recipe import load_recipe
from lola_ft.training.dataset import RunData, pin, prepare


def rows_file(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(language: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{language} {n}", "lang": language} for n in range(count)]


@pytest.fixture
def prepared(recipe_file: Callable[..., Path], tiny_base: Path) -> Callable[..., RunData]:
    """The data of a recipe with this data section."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    return lambda **data: prepare(load_recipe(recipe_file(data=data)).data, tokenizer, seed=0)


def source(path: str, **keys: Any) -> dict[str, Any]:
    return {"path": path, "format": "text", "language_column": "lang"} | keys


def test_the_manifest_knows_the_mix_and_what_was_left_out(prepared: Callable[..., RunData], tmp_path: Path) -> None:
    bad = [{"text": "", "lang": "en"}, {"lang": "en"}]
    english = rows_file(tmp_path, "data/en.jsonl", [*texts("en", 36), *texts("en", 4), *bad])
    swahili = rows_file(tmp_path, "data/sw.jsonl", texts("sw", 4))
    test = rows_file(tmp_path, "test.jsonl", texts("en", 2))
    data = prepared(
        sources=[source(str(tmp_path / "data"))],
        on_bad_row="skip",
        deduplicate=True,
        leakage="drop",
        validation=[source(test)],
        language_temperature=2.0,
        max_repeats=2,
    )
    kept = data.as_dict()
    assert kept["bad_rows"]["total"] == 2
    assert kept["bad_rows"]["messages"][0] == "en.jsonl:41: field 'text' is empty. Fill it, or remove the row."
    assert kept["duplicates"] == {"en": 4}
    assert kept["leakage"] == {"action": "drop", "rows": 2, "prompts": 0}
    assert {code: (share["available"], share["examples"]) for code, share in kept["mix"].items()} == {
        "en": (34, 30),
        "sw": (4, 8),
    }
    assert kept["train"]["total"]["rows"] == 38
    assert kept["validation"]["total"]["rows"] == 2
    assert list(kept["sha256"]) == [english, swahili, test]
    assert kept["sha256"][swahili] == hashlib.sha256(Path(swahili).read_bytes()).hexdigest()
    assert len(data.mix.dataset) == 38
    assert json.loads(json.dumps(kept)) == kept


def test_a_row_on_both_sides_is_refused_by_default(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    path = rows_file(tmp_path, "a.jsonl", texts("en", 3))
    outcome = verb("train", recipe_file(data={"sources": [source(path)], "validation": [source(path, limit=1)]}))
    assert outcome.code == 2
    assert f"{path}:1: the same row as {path}:1, which is for validation (1 such rows in all)" in outcome.err


def test_everything_that_happened_is_printed_before_training(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    english = rows_file(tmp_path, "en.jsonl", [*texts("en", 36), *texts("en", 4), {"text": 3, "lang": "en"}])
    swahili = rows_file(tmp_path, "sw.jsonl", texts("sw", 4))
    changes = {
        "sources": [source(english), source(swahili)],
        "on_bad_row": "skip",
        "deduplicate": True,
        "language_temperature": 2.0,
    }
    outcome = verb("train", recipe_file(data=changes), "--dry-run")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    start = next(place for place, line in enumerate(lines) if "Languages per epoch" in line)
    mixed = next(line for line in lines[start:] if "sw" in line).replace("│", " ").split()
    assert mixed[:6] == ["sw", "4", "10.0", "10", "25.0%", "2.50"]
    assert len(mixed) == 8  # planned and actual tokens
    assert "Skipped 1 row that cannot be used" in outcome.out
    assert "en.jsonl:41: field 'text' must be text; found a number." in outcome.out
    assert "Left out of training: 4 rows that repeat an earlier one." in outcome.out
    heading = " ".join(line for line in lines[:4]).split()
    assert {"byte", "word"} <= {word.strip("┃") for word in heading}


def test_a_hub_dataset_is_pinned_in_the_recipe_and_the_manifest(
    recipe_file: Callable[..., Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    read: list[str | None] = []

    def load_dataset(*_: Any, revision: str | None, **__: Any) -> list[dict[str, str]]:
        read.append(revision)
        return [{"text": f"row {n}"} for n in range(3)]

    monkeypatch.setattr("lola_ft.training.dataset.commit_of", lambda hub, revision: f"{hub}@{revision}")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = [{"hub": "a/b", "subset": "sw", "revision": "v1", "format": "text"}]
    recipe = load_recipe(recipe_file(data={"sources": sources}))
    pinned = pin(recipe.data)
    assert pinned.sources[0].revision == "a/b@v1"
    data = prepare(pinned, AutoTokenizer.from_pretrained(tiny_base), seed=0)
    assert read == ["a/b@v1"]
    assert data.as_dict()["commits"] == {"a/b/sw[train]": "a/b@v1"}
    assert load_recipe(recipe_file(data={"sources": sources})).data == recipe.data  # the recipe itself is left alone


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_mix_is_what_is_trained(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path, packing: bool
) -> None:
    """Four of the forty rows of each language, in batches of four: two steps an epoch; two rows do not fit in one."""
    data = {"max_per_language": 4, "packing": packing, "max_length": 128}
    trained = {"max_steps": None, "epochs": 1, "micro_batch_size": 4, "grad_accum_steps": 1}
    outcome = verb("train", recipe_file(data=data, train=trained))
    assert outcome.code == 0, outcome.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {code: share["examples"] for code, share in manifest["data"]["mix"].items()} == {"en": 4, "sw": 4}
    assert manifest["results"]["steps"] == 2
    assert manifest["results"]["tokens"] == sum(share["tokens"] for share in manifest["data"]["mix"].values())
    saved = (tmp_path / "run" / "adapter" / "prompt_template.jinja").read_text(encoding="utf-8")
    assert saved == Template.load("alpaca").source
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert again.data.max_per_language == 4
