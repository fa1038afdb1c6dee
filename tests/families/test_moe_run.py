"""Recipes on transformers' mixtures of experts: trained, resumed, planned, evaluated, asked, merged, profiled.

The fast tests use OLMoE, the slow ones all families.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lola_ft.errors import UserError
from lola_ft.families import FAMILIES
from lola_ft.open_model import open_model
from lola_ft.recipe import load_recipe
from lola_ft.routing import read_profile
from lola_ft.training import train
from lola_ft.training.reports.metrics import read_metrics
from tests.conftest import write_rows
from tests.families.conftest import write_recipe
from tests.families.moe import KINDS

FILE = Path("adapter") / "adapter_model.safetensors"
IDS = torch.tensor([[20, 30, 40, 50, 60, 70]])

pytestmark = pytest.mark.filterwarnings("ignore:The following")  # PEFT applies patterns that its warning calls ignored
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "olmoe"]


def moe_recipe(path: Path, kind: str, base: Path, rows: Path, **changes: Any) -> Path:
    """Write a recipe with LoRA on every group except the router, which is fully trained with its authors' losses."""
    groups = {group: {"rank": 4} for group in KINDS[kind].groups if group != "router"}
    adapter = {"mlp": None, "alpha": 8, "dropout": 0.05} | groups
    routing = FAMILIES[kind].routing
    router = {"mode": "tuned", "z_loss": 0.001} | ({"aux_loss": 0.01} if routing and routing.balance else {})
    return write_recipe(path, base, rows, **{"adapter": adapter, "router": router} | changes)


@pytest.fixture(scope="module", params=["olmoe", *SLOW])
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    moe_bases: dict[str, Path],
    rows_file: Path,
) -> tuple[Path, str]:
    """The folder of a finished run on a 4-bit base, packed and with gradient checkpointing; and its kind."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    return train(load_recipe(moe_recipe(folder / "recipe.yaml", kind, moe_bases[kind], rows_file))), kind


def test_a_run_lowers_the_loss_and_records_its_routers(run: tuple[Path, str]) -> None:
    folder, kind = run
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    first = next(line for line in lines if "loss" in line)
    assert ("aux_loss" not in first) == (FAMILIES[kind].routing.balance is None)
    assert 1 < first.get("aux_loss", 2) < 8
    assert first["z_loss"] > 0
    assert 0 < first["router_min_entropy"] <= 1
    assert first["router_tokens"] > 50
    assert any("flip" in key for line in lines for key in line)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base"]["family"] == kind
    assert "CC BY" not in (folder / "README.md").read_text()  # LOLA's licence is not this base's


def test_a_run_needs_the_planned_disk_space(run: tuple[Path, str], verb: Callable[..., Any]) -> None:
    folder, _ = run
    outcome = verb("plan", folder / "recipe.yaml", "--json")
    assert outcome.code == 0, outcome.err
    planned, manifest = json.loads(outcome.out), json.loads((folder / "manifest.json").read_text())
    assert planned["adapter_file_bytes"] == (folder / FILE).stat().st_size
    assert planned["weights"] == manifest["base"]["parts"]
    trained = sum(count["parameters"] for count in manifest["trained"].values())
    assert planned["trained_parameters"] == trained
    assert planned["parts"]["gradients"] == 4 * trained


def test_stock_peft_and_the_merge_give_the_same_logits(
    run: tuple[Path, str], moe_bases: dict[str, Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    folder, kind = run
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(moe_bases[kind]), folder / "adapter")
    outcome = verb("merge", folder, "--out", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ours = open_model(folder, quantization="none", dtype="float32", device="cpu").model
    plain = AutoModelForCausalLM.from_pretrained(moe_bases[kind]).eval()
    with torch.no_grad():
        expected = stock.eval()(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-4)
        assert (plain(IDS).logits - expected).abs().max() > 0.1
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["applied"] == report["adapter_tensors"] > 50
    planned = json.loads(verb("plan", folder / "recipe.yaml", "--json").out)["merged_file_bytes"]
    assert {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")} == planned
    assert open_model(tmp_path / "merged", dtype="float32", device="cpu").template is not None


def test_a_run_answers_and_is_evaluated(run: tuple[Path, str], rows_file: Path, verb: Callable[..., Any]) -> None:
    folder, _ = run
    said = verb("generate", folder, "--prompt", "Name 3", "--max-new-tokens", "4")
    assert said.code == 0, said.err
    common = ("--data", rows_file, "--format", "alpaca", "--task", "loss", "--out", folder.parent / "evaluation")
    outcome = verb("evaluate", folder, *common)
    assert outcome.code == 0, outcome.err


def test_routing_counts_every_choice_and_selects_experts(
    run: tuple[Path, str], moe_bases: dict[str, Path], rows_file: Path, verb: Callable[..., Any], tmp_path: Path
) -> None:
    folder, kind = run
    top_k = next(
        KINDS[kind].sizes[key] for key in ("num_experts_per_tok", "moe_k", "moe_topk") if key in KINDS[kind].sizes
    )
    profiles = []
    for name, model in (("base", moe_bases[kind]), ("run", folder)):
        data = ("--data", rows_file, "--format", "alpaca", "--language-column", "language")
        outcome = verb("routing", "profile", model, *data, "--out", tmp_path / f"{name}.safetensors")
        assert outcome.code == 0, outcome.err
        profiles.append(read_profile(tmp_path / f"{name}.safetensors"))
    for profile in profiles:
        assert torch.equal(
            profile.counts_LME.sum(-1), top_k * profile.tokens_L[:, None].expand(profile.counts_LME.shape[:2])
        )
        assert profile.choices_SM.shape[1:] == (len(profile.about.layers), top_k)
        torch.testing.assert_close(profile.mean_probs_LME.sum(-1), torch.ones(profile.counts_LME.shape[:2]))
    report = verb("routing", "report", tmp_path / "base.safetensors", tmp_path / "run.safetensors")
    assert report.code == 0, report.err
    chosen = ("--languages", profiles[0].languages[0], "--out", tmp_path / "experts.json", "--coverage", "0.5")
    outcome = verb("routing", "select", tmp_path / "base.safetensors", *chosen)
    assert outcome.code == 0, outcome.err
    selected = json.loads((tmp_path / "experts.json").read_text())["experts"]
    assert [len(set(ids)) for ids in selected] == [len(ids) for ids in selected]
    assert all(0 < len(ids) < profiles[0].num_experts for ids in selected)


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(
    run: tuple[Path, str], moe_bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    folder, kind = run
    shutil.copytree(folder, tmp_path / "run")
    for name in ("manifest.json", "README.md", "loss.png"):
        (tmp_path / "run" / name).unlink()
    for name in ("adapter", "checkpoints/step-12"):
        shutil.rmtree(tmp_path / "run" / name)
    again = train(load_recipe(moe_recipe(tmp_path / "recipe.yaml", kind, moe_bases[kind], rows_file)), resume=True)
    assert json.loads((again / "manifest.json").read_text())["timings"]["resumed_from_step"] == 6
    assert (again / FILE).read_bytes() == (folder / FILE).read_bytes()


@pytest.mark.slow
def test_a_frozen_router_is_not_in_the_adapter(moe_bases: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    router = {"mode": "frozen", "aux_loss": 0.0, "z_loss": 0.0}
    file = moe_recipe(
        tmp_path / "recipe.yaml", "olmoe", moe_bases["olmoe"], rows_file, router=router, train={"max_steps": 2}
    )
    folder = train(load_recipe(file))
    assert not [name for name in load_file(folder / FILE) if ".gate." in name]


def test_more_experts_than_there_are_cannot_be_selected(
    moe_bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    adapter = {"mlp": None, "experts": {"rank": 4, "select": [[0, 8], [1]]}}
    file = moe_recipe(tmp_path / "recipe.yaml", "olmoe", moe_bases["olmoe"], rows_file, adapter=adapter)
    with pytest.raises(UserError, match=r"there is no expert 8; experts are 0 to 7"):
        train(load_recipe(file), dry_run=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind != "mixtral" else []) for kind in KINDS]
)
def test_a_preference_run_learns(kind: str, moe_bases: dict[str, Path], tmp_path: Path) -> None:
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    pairs = [{"prompt": f"Name {i}", "chosen": names[i], "rejected": names[i - 3], "lang": "sw"} for i in range(8)]
    rows = write_rows(tmp_path / "rows.jsonl", pairs)
    file = moe_recipe(
        tmp_path / "recipe.yaml",
        kind,
        moe_bases[kind],
        rows,
        objective="dpo",
        adapter={"mlp": None, "experts": {"rank": 4}, "dropout": 0.0},
        router={"mode": "lora", "rank": 4, "aux_loss": 0.0, "z_loss": 0.0},
        data={
            "sources": [{"path": str(rows), "format": "preference", "language_column": "lang"}],
            "packing": False,
            "validation": 0,
        },
        train={"max_steps": 12, "micro_batch_size": 8, "learning_rate": 0.005, "save_every": 0, "optimizer": "adamw"},
    )
    lines = [line for line in read_metrics(train(load_recipe(file)) / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < 0.66
    assert lines[-1]["rewards/margins"] > 0.05
