"""Datasets of the Hub: subsets, streaming, commits. A folder stands in for the Hub: `datasets` reads both alike."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from lola_ft.data import Source, commit_of, read_examples, read_rows
from lola_ft.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for language in ("sw", "de"):
        lines = "".join(f'{{"text": "{language} {n}"}}\n' for n in range(3))
        (tmp_path / "set" / f"{language}.jsonl").write_text(lines)
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {code}\n  data_files: [{{split: train, path: {code}.jsonl}}]\n" for code in ("sw", "de")
        )
        + "---\n"
    )
    return str(tmp_path / "set")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_subset_is_read_row_by_row_or_whole(folder: str, streaming: bool) -> None:
    source = Source("text", hub=folder, subset="de", streaming=streaming, limit=2, language="de")
    found = [(row.completion, row.where) for row in read_examples([source])]
    assert found == [(f"de {n}", f"{folder}/de[train]:[{n}]") for n in (0, 1)]


def test_a_missing_subset_or_split_is_the_users_to_know(folder: str) -> None:
    with pytest.raises(DataError, match=r"/yo\[train\]: cannot be loaded from the Hub: BuilderConfig 'yo' not found"):
        read_rows(Source("text", hub=folder, subset="yo"))
    with pytest.raises(DataError, match=r"/sw\[dev\]: cannot be loaded from the Hub: "):
        list(read_rows(Source("text", hub=folder, subset="sw", split="dev", streaming=True)))


def test_a_connection_that_breaks_half_way_is_one_message(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: Any, **__: Any) -> Any:
        yield {"text": "a"}
        raise ConnectionError("the line went dead\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    reading = read_rows(Source("text", hub=folder, streaming=True))
    assert next(reading).fields == {"text": "a"}
    with pytest.raises(DataError) as caught:
        next(reading)
    assert str(caught.value) == f"{folder}[train]: cannot be read to its end: the line went dead"


def test_a_branch_is_pinned_to_its_commit(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def dataset_info(_: Any, name: str, revision: str | None, timeout: int) -> Any:
        asked.append((name, revision, timeout))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert commit_of("a/b", "main") == COMMIT
    assert asked == [("a/b", "main", 10)]
    assert commit_of("a/b", "f" * 40) == "f" * 40  # a commit already; nobody is asked
    assert commit_of(folder, None) is None
    assert len(asked) == 1


def test_without_the_hub_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    assert commit_of("a/b", "main") is None
