"""Encoded rows on disk: found again only for equal inputs, replaced when damaged."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lola_ft.checkpoints.base_checkpoint import open_config
from lola_ft.checkpoints.tokenizer import load_tokenizer
from lola_ft.data import encoded_cache
from lola_ft.errors import UserError
from lola_ft.files import cache_root
from lola_ft.recipe.schema import Data
from lola_ft.training.dataset import RunData, prepare
from tests.conftest import alpaca_rows, write_rows


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_base, open_config(tiny_base)[1].config)


def section(rows: Path, **changes: Any) -> Data:
    source = {"path": str(rows), "format": "alpaca", "language_column": "language"}
    return Data.model_validate({"sources": [source], "max_length": 128, **changes})


def entries() -> list[Path]:
    return sorted((cache_root() / "rows").iterdir())


def assert_same(one: RunData, other: RunData) -> None:
    for a, b in ((one.train, other.train), (one.validation, other.validation)):
        assert (a is None) == (b is None)
        if a and b:
            assert a.dataset.to_dict() == b.dataset.to_dict()
            assert a.dataset._fingerprint == b.dataset._fingerprint
            assert (a.languages, a.report) == (b.languages, b.report)
    assert json.dumps(one.as_dict()) == json.dumps(other.as_dict())


def test_the_second_time_the_rows_come_from_the_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = alpaca_rows(60)
    file = write_rows(tmp_path / "rows.jsonl", [*rows, {"instruction": "no answer", "language": "en"}, rows[0]])
    held = write_rows(tmp_path / "held.jsonl", rows[:3])
    source = {"path": str(held), "format": "alpaca", "language": "sw"}
    data = section(file, on_bad_row="skip", deduplicate=True, validation=[source], leakage="drop")
    first = prepare(data, tokenizer, 0)
    assert first.note == ""
    assert all((first.bad_rows, first.duplicates, first.leaks))  # all that is remembered of rows is put to the test
    monkeypatch.setattr("lola_ft.training.dataset.encode", None)  # nothing is encoded again
    second = prepare(data, tokenizer, 0)
    assert second.note == "Encoded rows come from the cache."
    assert_same(first, second)
    assert second.bad_rows == first.bad_rows


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 100},
    "overlong": {"overlong": "truncate"},
    "template": {"template": "plain"},
    "normalize": {"normalize": "nfc"},
    "on_bad_row": {"on_bad_row": "skip"},
    "validation": {"validation": 0.2},
    "deduplicate": {"deduplicate": True},
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_decides_the_rows_decides_the_entry(key: str, tokenizer: PreTrainedTokenizerFast, rows_file: Path) -> None:
    prepare(section(rows_file), tokenizer, 0)
    assert prepare(section(rows_file, **CHANGES[key]), tokenizer, 0).note == ""
    assert len(entries()) == 2


def test_files_tokenizer_template_and_seed_decide_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", alpaca_rows(40))
    template = tmp_path / "own.jinja"
    template.write_text("{{ prompt }}\n")
    data = section(file, template=str(template), validation=0.3)
    prepare(data, tokenizer, 0)
    assert prepare(data, tokenizer, 0).note
    assert not prepare(data, tokenizer, 1).note  # another seed holds out other rows
    template.write_text("Q: {{ prompt }}\n")
    assert not prepare(data, tokenizer, 0).note
    write_rows(file, alpaca_rows(41))
    assert not prepare(data, tokenizer, 0).note
    tokenizer.add_tokens(["Name"])
    assert not prepare(data, tokenizer, 0).note


def test_what_decides_no_row_finds_the_entry(tokenizer: PreTrainedTokenizerFast, rows_file: Path) -> None:
    prepare(section(rows_file), tokenizer, 0)
    mixed = prepare(section(rows_file, packing=False, language_temperature=2.0, max_per_language=10), tokenizer, 5)
    assert mixed.note
    assert len(mixed.mix.dataset) == 20


@pytest.mark.parametrize("name", ["train.arrow", "facts.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_replaced(name: str, how: str, tokenizer: PreTrainedTokenizerFast, rows_file: Path) -> None:
    first = prepare(section(rows_file), tokenizer, 0)
    [entry] = entries()
    content = (entry / name).read_bytes()
    (entry / name).unlink()  # the mapped file itself must not change
    if how != "gone":
        half = len(content) // 2
        changed = content[:half] if how == "cut" else content[:half] + b"\x07" + content[half + 1 :]
        (entry / name).write_bytes(changed)
    again = prepare(section(rows_file), tokenizer, 0)
    assert "in the cache were damaged" in again.note
    assert_same(first, again)
    assert prepare(section(rows_file), tokenizer, 0).note == "Encoded rows come from the cache."


def test_a_mistake_leaves_no_entry(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*alpaca_rows(5), {"instruction": "no answer", "language": "en"}])
    with pytest.raises(Exception, match="field 'output' is missing"):
        prepare(section(file), tokenizer, 0)
    assert entries() == []


def test_only_the_newest_entries_stay(
    tokenizer: PreTrainedTokenizerFast, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_cache, "KEPT", 2)
    for place, length in enumerate((100, 101, 102)):
        prepare(section(rows_file, max_length=length), tokenizer, 0)
        for entry in entries():
            if entry.stat().st_mtime > 1000:
                os.utime(entry, (100 + place, 100 + place))
    assert len(entries()) == 2
    assert not prepare(section(rows_file, max_length=100), tokenizer, 0).note
    assert prepare(section(rows_file, max_length=102), tokenizer, 0).note


def test_what_killed_processes_left_is_removed(tokenizer: PreTrainedTokenizerFast, rows_file: Path) -> None:
    root = cache_root() / "rows"
    for name in (".partial-old", ".partial-new"):
        (root / name).mkdir(parents=True)
    os.utime(root / ".partial-old", (1000, 1000))
    prepare(section(rows_file), tokenizer, 0)
    names = {path.name for path in entries()}
    assert (".partial-old" in names, ".partial-new" in names, len(names)) == (False, True, 2)


def test_a_full_disk_is_the_users_to_know() -> None:
    with pytest.raises(UserError, match="no room for the encoded rows"), encoded_cache.new_folder() as (folder, _):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not folder.exists()


def test_without_a_cache_to_write_to_it_works_all_the_same(
    tokenizer: PreTrainedTokenizerFast, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(section(rows_file), tokenizer, 0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "file"))
    second = prepare(section(rows_file), tokenizer, 0)
    assert second.note == ""
    assert_same(first, second)


def test_two_processes_at_once_make_one_entry(tokenizer: PreTrainedTokenizerFast, rows_file: Path) -> None:
    """Both fill a folder of their own; the one that comes second finds the place taken and drops its own."""
    data = section(rows_file)
    first = prepare(data, tokenizer, 0)
    [entry] = entries()
    before = entry.stat().st_ino
    with encoded_cache.new_folder() as (folder, keepable):
        assert keepable
        (folder / "train.arrow").write_bytes((entry / "train.arrow").read_bytes())
        encoded_cache.keep(folder, entry.name, encoded_cache.StoredRows(first.train, None, {}))
    assert [path.name for path in entries()] == [entry.name]
    assert entry.stat().st_ino == before
    assert_same(first, prepare(data, tokenizer, 0))


def test_preview_says_that_rows_come_from_the_cache(recipe_file: Callable[..., Path], verb: Callable[..., Any]) -> None:
    recipe = recipe_file()
    assert "from the cache" not in verb("preview", recipe).out
    assert "Encoded rows come from the cache." in verb("preview", recipe).out
