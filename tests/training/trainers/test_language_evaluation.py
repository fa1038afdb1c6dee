"""Evaluation by language, forgetting, early stopping, the best adapter, and what the manifest says of a run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from lola_ft.data import Template, encode, read_examples
from lola_ft.data.rows import Source
from lola_ft.open_model import open_model
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from lola_ft.training.callbacks.alarm import Alarm
from lola_ft.training.callbacks.loss_guards import Forgetting
from lola_ft.training.reports.metrics import MetricsFile, read_metrics
from tests.conftest import alpaca_rows, write_rows

WEIGHTS = Path("adapter/adapter_model.safetensors")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Training in English alone; validation in English and in a language that answers otherwise."""
    rows = alpaca_rows(40)
    english = [row | {"language": "en"} for row in rows]
    other = [row | {"output": "Jina langu ni " + row["output"][::-1], "language": "sw"} for row in rows[:12]]
    held = [row | {"input": "again"} for row in english[:12]]
    files = {"train": english, "held": [*held, *other]}
    made = {name: write_rows(tmp_path / f"{name}.jsonl", content) for name, content in files.items()}
    source = {"format": "alpaca", "language_column": "language"}
    return {
        "sources": [source | {"path": str(made["train"])}],
        "validation": [source | {"path": str(made["held"])}],
        "leakage": "allow",
        "template": "plain",
    }


@pytest.mark.slow
def test_forgetting_is_measured_by_language_and_said(
    recipe_file: Callable[..., Path], sources: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"max_steps": 30, "eval_every": 15, "learning_rate": 0.03, "save_every": 0}
    path = recipe_file(data=sources, train=changes, guards={"forgetting": 0.05})
    train(load_recipe(path))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 15, 30, 30]
    first, last = evaluations[0]["eval_loss_by_language"], evaluations[-1]["eval_loss_by_language"]
    assert set(first) == {"en", "sw"}
    assert last["en"] < first["en"] - 1
    warned = [line for line in lines if line.get("warning") == "forgetting"]
    rose = {
        code
        for line in evaluations
        for code, loss in line["eval_loss_by_language"].items()
        if loss > first[code] + 0.05
    }
    assert rose == {"sw"}
    assert all("the validation loss of sw" in line["message"] for line in warned)
    assert warned
    assert warned[0]["message"] in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")
    assert (tmp_path / "run" / "languages.png").exists()
    assert_losses_are_those_of_the_adapter(tmp_path, sources, evaluations[-1])


def assert_losses_are_those_of_the_adapter(tmp_path: Path, sources: dict[str, Any], line: dict[str, Any]) -> None:
    """The logged losses against sums over single rows, one by one, of the saved adapter."""
    opened = open_model(tmp_path / "run")
    template = Template.load("plain")
    examples = read_examples([Source(**sources["validation"][0])])
    encoded = encode(examples, opened.tokenizer, template, 128)
    sums = dict[str, list[float]]()
    for language, row in zip(encoded.languages, encoded.dataset, strict=True):
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            loss = opened.model(input_ids=ids, labels=labels).loss.item()
        count = int((labels[:, 1:] != -100).sum())
        total = sums.setdefault(language, [0.0, 0])
        total[0], total[1] = total[0] + loss * count, total[1] + count
    for code, (total, count) in sums.items():
        assert line["eval_loss_by_language"][code] == pytest.approx(total / count, abs=2e-4)
    whole = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    assert line["eval_loss"] == pytest.approx(whole, abs=2e-4)


def test_a_loss_that_is_not_a_number_is_worse(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    guard = Forgetting(None, 0.1, Alarm("forgetting", metrics))
    guard.baseline = {"en": 2.0, "sw": 2.0}
    losses = {"eval_loss_by_language/en": 2.05, "eval_loss_by_language/sw": math.nan}
    guard.on_evaluate(None, TrainerState(global_step=3), TrainerControl(), losses)
    [line] = read_metrics(metrics.path)
    assert (line["step"], line["warning"]) == (3, "forgetting")
    assert "the validation loss of sw is nan" in line["message"]


@pytest.mark.slow
def test_early_stopping_ends_with_the_best_adapter(
    recipe_file: Callable[..., Path], sources: dict[str, Any], tmp_path: Path
) -> None:
    """Swahili gets worse from some evaluation on: the run ends two later, with the adapter of the best."""
    watched = "eval_loss_by_language/sw"
    changes = {
        "max_steps": 60,
        "eval_every": 2,
        "learning_rate": 0.03,
        "save_every": 3,
        "keep": 1,
        "keep_best": True,
        "early_stopping": {"metric": watched, "patience": 2},
    }
    train(load_recipe(recipe_file(data=sources, train=changes)))
    run = tmp_path / "run"
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]
    losses = {line["step"]: line["eval_loss_by_language"]["sw"] for line in lines[:-1] if line["step"]}
    best = min(losses, key=losses.__getitem__)
    results = json.loads((run / "manifest.json").read_text())["results"]
    assert results["best_step"] == best
    assert results["steps"] == max(losses) == best + 4 < 60
    assert results["eval_loss_by_language"]["sw"] == pytest.approx(losses[best], abs=1e-5)
    kept, final = load_file(run / "checkpoints" / f"step-{best}" / WEIGHTS), load_file(run / WEIGHTS)
    assert all(torch.equal(kept[name], tensor) for name, tensor in final.items())
    assert len(list((run / "checkpoints").iterdir())) == 2  # keep: 1, and the best


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_not_used(
    recipe_file: Callable[..., Path], sources: dict[str, Any], tmp_path: Path, verb: Callable[..., Any]
) -> None:
    """One bit of a weight; the file can be read as before. The first evaluation of training stays the best."""
    stopping = {"early_stopping": {"patience": 9, "min_delta": 9.0}}
    changes = {"max_steps": 2, "eval_every": 1, "keep": 1, "keep_best": True} | stopping
    recipe = recipe_file(data=sources, train=changes)
    train(load_recipe(recipe))
    run = tmp_path / "run"
    assert json.loads((run / "manifest.json").read_text())["results"]["best_step"] == 1
    tensors = run / "checkpoints" / "step-1" / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    (run / "README.md").unlink()  # as if it had been killed before the end
    outcome = verb("train", recipe, "--resume")
    assert outcome.code == 2
    assert "step-1: the best checkpoint is damaged (state.safetensors has changed since it was written)" in outcome.err
    repaired = verb("train", recipe, "--resume", "train.keep_best=false", "--allow-changed", "train.keep_best")
    assert repaired.code == 0, repaired.err
    assert "best_step" not in json.loads((run / "manifest.json").read_text())["results"]


def test_what_early_stopping_cannot_watch_is_refused(
    recipe_file: Callable[..., Path], sources: dict[str, Any], verb: Callable[..., Any], tmp_path: Path
) -> None:
    for train_changes, data, expected in (
        ({"early_stopping": {"metric": "eval_loss_by_language/fr"}}, sources, "there is no 'eval_loss_by_language/fr'"),
        ({"keep_best": True}, {}, "train.keep_best: needs validation data to choose by"),
        ({"keep_best": True, "eval_every": 0}, sources, "train.keep_best: needs evaluations during the run"),
    ):
        outcome = verb("train", recipe_file(data=data, train=train_changes))
        assert outcome.code == 2
        assert expected in outcome.err
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_same_recipe_same_manifest(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    manifests = []
    for name in ("first", "second"):
        train(load_recipe(recipe_file(data={"validation": 0.2}, output=str(tmp_path / name))))
        manifests.append(json.loads((tmp_path / name / "manifest.json").read_text()))
    for manifest in manifests:
        assert manifest["timings"]["tokens_per_s"] > 0
        assert manifest["memory"]["resident_mb"] >= manifest["memory"]["anonymous_mb"] * 0.9 > 100
        assert set(manifest["memory"]["measured"]) >= {"resident_mb", "anonymous_mb"}
        assert manifest["results"]["routing"]["lowest load entropy of a layer"] > 0
        assert manifest["stages"][-1].pop("run") == Path(manifest["recipe"].pop("output")).name
        del manifest["timings"], manifest["memory"]
    assert manifests[0] == manifests[1]
    assert manifests[0]["seeds"] == {"train": 0, "data": 0}
    assert manifests[0]["hardware"]["cpus"] > 0
    card = (tmp_path / "first" / "README.md").read_text()
    assert "## Routing" in card
    assert "largest share of an expert" in card


def test_a_tracker_that_is_not_installed_is_refused(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lola_ft.training import optional_packages

    monkeypatch.setattr(optional_packages, "find_spec", lambda _: None)
    outcome = verb("train", recipe_file(train={"report_to": ["wandb", "tensorboard"]}))
    assert outcome.code == 2
    assert "train.report_to: wandb and tensorboard are not installed" in outcome.err
    assert not (tmp_path / "run").exists()
