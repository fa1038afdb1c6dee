"""The transfer matrix: a run's languages from its manifest, changes against the base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lola_ft.evaluation.transfer import few, trained_languages
from tests.conftest import Outcome, write_rows

Verb = Callable[..., Outcome]


@pytest.fixture
def make_run(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **tokens: int) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_adapter, folder / "adapter")
        own = {"model": str(tiny_base), "revision": "main", "quantization": "none"}
        counts = {code: {"trained_tokens": count} for code, count in tokens.items()}
        manifest = {"recipe": {"base": own}, "data": {"train": {"languages": counts}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_the_matrix_holds_each_runs_change_by_tested_language(
    verb: Verb, make_run: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    runs = [make_run("one", sw=10, de=70), make_run("two", en=5)]
    rows = [{"text": f"one two {word}", "lang": code} for word in ("red", "blue", "nine") for code in ("sw", "en")]
    data = ("--data", write_rows(tmp_path / "rows.jsonl", rows), "--format", "text", "--language-column", "lang")
    outcome = verb("evaluate", tiny_base, *runs, *data, "--transfer", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    matrix = json.loads((tmp_path / "out/transfer.json").read_text())
    assert [(Path(line["run"]).name, line["trained"]) for line in matrix] == [("one", ["de", "sw"]), ("two", ["en"])]
    bits = json.loads((tmp_path / "out/loss.json").read_text())["results"]["bits_per_byte"]
    for line in matrix:
        assert list(line["change"]) == ["all", "en", "sw"]
        for tested, change in line["change"].items():
            models = bits[tested]["models"]
            assert change["value"] == pytest.approx(models[line["run"]]["value"] - models[str(tiny_base)]["value"])
            assert change["low"] <= change["value"] <= change["high"]
    assert (tmp_path / "out/transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "de, sw" in outcome.out


def test_languages_with_most_tokens_come_first(make_run: Callable[..., Path]) -> None:
    assert trained_languages(str(make_run("run", a=1, c=5, b=5, d=2, e=9))) == ["e", "b", "c", "d", "a"]
    assert few(["e", "b", "c", "d", "a"]) == "e, b, c and 2 more"
    assert few(["e", "b", "c"]) == "e, b, c"


def test_mistakes_are_one_message(verb: Verb, make_run: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> None:
    run = make_run("run", sw=1)
    data = ("--data", write_rows(tmp_path / "rows.jsonl", [{"text": "one two"}]), "--format", "text", "--transfer")
    assert "at least one run" in verb("evaluate", tiny_base, *data).err
    assert "base has no manifest.json" in verb("evaluate", run, tiny_base, *data).err
    assert "does not measure" in verb("evaluate", tiny_base, run, *data, "--task", "choice").err
    (run / "manifest.json").write_text("{}")
    assert "does not list the languages" in verb("evaluate", tiny_base, run, *data).err
