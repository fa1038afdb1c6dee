"""The reference of DPO and KTO in a run that goes on from an adapter: that adapter, or the base if it is asked for."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from ruamel.yaml import YAML
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lola_ft.adapters import load_adapter
from lola_ft.quantization import load_base
from lola_ft.recipe import load_recipe
from lola_ft.training.base_model import load_with_adapter
from lola_ft.training.dataset import prepare
from lola_ft.training.setup import fit_to_base
from tests.conftest import Outcome, assert_says, write_rows
from tests.families.moe import make_moe
from tests.training.checkpointing.test_resume import run_child
from tests.training.conftest import recipe_dict
from tests.training.test_continue_from import KINDS
from tests.training.trainers.test_preference import JUDGED, PAIRS, log_probs, metrics, without_times

STARTS = {"dpo": math.log(2), "kto": 0.5}
SFT = {"max_steps": 4, "grad_accum_steps": 1, "optimizer": "adamw", "learning_rate": 0.02}


class Preference:
    """Trains an adapter with answers, and writes recipes of preferences that go on from it."""

    def __init__(self, folder: Path, base: Path, rows: Path, verb: Callable[..., Outcome]) -> None:
        self.folder, self.base, self.rows, self.verb = folder, base, rows, verb

    def first(self, **changes: Any) -> Path:
        recipe = recipe_dict(self.base, self.rows, self.folder / "first", train=SFT, **changes)
        recipe["adapter"] = {key: value for key, value in recipe["adapter"].items() if value is not None}
        YAML().dump(recipe, self.folder / "first.yaml")
        done = self.verb("train", self.folder / "first.yaml")
        assert done.code == 0, done.err
        return self.folder / "first"

    def recipe(self, objective: str, start: Path, name: str = "", **train: Any) -> Path:
        rows = write_rows(self.folder / f"{objective}.jsonl", PAIRS if objective == "dpo" else JUDGED)
        form = "preference" if objective == "dpo" else "unpaired_preference"
        name = name or objective
        recipe = recipe_dict(self.base, rows, self.folder / name, objective=objective)
        recipe["adapter"] = {"continue_from": str(start)}
        recipe["data"]["sources"] = [{"path": str(rows), "format": form, "language_column": "lang"}]
        recipe["train"] |= {"micro_batch_size": 4, "grad_accum_steps": 1, "optimizer": "adamw"} | train
        YAML().dump(recipe, self.folder / f"{name}.yaml")
        return self.folder / f"{name}.yaml"

    def losses(self, recipe: Path, *arguments: str) -> list[dict[str, Any]]:
        done = self.verb("train", str(recipe), *arguments)
        assert done.code == 0, done.err
        return [line for line in metrics(self.folder / recipe.stem) if "loss" in line]


@pytest.fixture
def preference(tmp_path: Path, tiny_base: Path, rows_file: Path, verb: Callable[..., Outcome]) -> Preference:
    return Preference(tmp_path, tiny_base, rows_file, verb)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "kind"),
    [("dpo", "trained too"), ("kto", "lora"), *(("dpo", kind) for kind in KINDS if kind != "trained too")],
)
def test_the_first_loss_is_that_of_no_change(objective: str, kind: str, preference: Preference) -> None:
    """The adapter has moved away from the base, and is its own reference all the same; nothing of it stays behind."""
    first = preference.first(**KINDS[kind])
    lines = preference.losses(preference.recipe(objective, first, max_steps=6, grad_accum_steps=2))
    assert lines[0]["loss"] == pytest.approx(STARTS[objective], abs=1e-6)
    assert (lines[0]["rewards/chosen"], lines[0]["rewards/rejected"]) == (0, 0)
    assert lines[-1]["rewards/margins"] > 0.001
    assert (
        json.loads((preference.folder / objective / "manifest.json").read_text())["stages"][-1]["reference"]
        == "adapter"
    )


@pytest.mark.slow
def test_the_first_loss_of_another_family_is_that_of_no_change(
    tmp_path: Path, rows_file: Path, verb: Callable[..., Outcome]
) -> None:
    preference = Preference(tmp_path, make_moe(tmp_path / "olmoe", "olmoe"), rows_file, verb)
    first = preference.first(adapter={"mlp": None}, router={"mode": "lora", "rank": 2})
    lines = preference.losses(preference.recipe("dpo", first, max_steps=4))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_the_base_is_the_reference_if_it_is_asked_for(preference: Preference) -> None:
    """The first rewards are how far the first stage has moved the answers, here computed from whole logits."""
    first = preference.first(**KINDS["trained too"])
    lines = preference.losses(preference.recipe("dpo", first, max_steps=1, reference="base", micro_batch_size=8))
    assert abs(lines[0]["loss"] - math.log(2)) > 0.001
    model = load_adapter(load_base(preference.base, "nf4", "float32", "cpu", quiet=True), first / "adapter")
    batch = batch_of_all(preference)
    gained = log_probs(model, batch)
    with model.disable_adapter():
        gained = gained - log_probs(model, batch)
    chosen, rejected = gained.chunk(2)
    assert lines[0]["rewards/chosen"] == pytest.approx(0.1 * chosen.mean().item(), rel=1e-3)
    assert lines[0]["rewards/rejected"] == pytest.approx(0.1 * rejected.mean().item(), rel=1e-3)


def batch_of_all(preference: Preference) -> dict[str, torch.Tensor]:
    """All pairs as one batch: the chosen answers, then the rejected ones."""
    recipe = load_recipe(preference.folder / "dpo.yaml")
    tokenizer = AutoTokenizer.from_pretrained(preference.base)
    rows = prepare(recipe.data, tokenizer, seed=0).train.dataset
    return dict(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(list(rows)))


@pytest.mark.slow
def test_only_the_active_adapter_is_trained_and_saved(preference: Preference) -> None:
    first = preference.first(**KINDS["trained too"])
    recipe = load_recipe(preference.recipe("dpo", first, reference_pass="beside"))
    recipe, base = fit_to_base(recipe, Console(quiet=True), weights=True)
    model, _ = load_with_adapter(base, recipe, torch.float32, torch.device("cpu"), Console(quiet=True))
    assert isinstance(model, PeftModel)
    assert (list(model.peft_config), model.active_adapter) == (["default", "ref"], "default")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name.replace(".ref", ".default") for name, _ in model.named_parameters() if ".ref" in name}
    assert trained == frozen


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_killed_run_resumes_to_the_same_bits_without_the_first_stage(objective: str, preference: Preference) -> None:
    """Its reference is still where it started, not where it was stopped."""
    first = preference.first()
    whole, cut = (preference.recipe(objective, first, name, max_steps=4, save_every=2) for name in ("whole", "cut"))
    assert run_child(whole).code == 0
    assert run_child(cut, moment="logged", step=3).code == -signal.SIGKILL
    first.rename(preference.folder / "gone")
    resumed = run_child(cut, "--resume")
    assert resumed.code == 0, resumed.out
    assert "Going on from step 2" in resumed.out
    runs = [preference.folder / name for name in ("whole", "cut")]
    files = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]
    assert without_times(runs[0]) == without_times(runs[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.continue_from=null", "adapter.attention.rank=4"],
            "train.reference: there is no adapter to refer to",
        ),
        (["objective=sft"], "train.reference: belongs to objective dpo or kto"),
    ],
)
def test_a_reference_without_meaning_is_refused(overrides: list[str], message: str, preference: Preference) -> None:
    recipe = preference.recipe("dpo", Path("anything"), reference="adapter")
    outcome = preference.verb("train", str(recipe), *overrides)
    assert outcome.code == 2
    assert_says(outcome.err, message)


@pytest.mark.slow
def test_a_plan_counts_the_reference(preference: Preference) -> None:
    recipe = preference.recipe("dpo", preference.first(), reference_pass="beside")
    with_adapter, with_base = (
        json.loads(preference.verb("plan", str(recipe), "--json", f"train.reference={reference}").out)
        for reference in ("adapter", "base")
    )
    assert with_adapter["parts"].pop("reference") == with_base["parts"]["adapter"]
    assert with_adapter["parts"] == with_base["parts"]
    assert with_adapter["peak_bytes"] == with_base["peak_bytes"] + with_base["parts"]["adapter"]
    assert "frozen copy of the starting adapter" in preference.verb("plan", str(recipe)).out
