"""A run that goes on from an adapter: its weights, its settings, its chain of stages; what does not fit is refused."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from rich.console import Console
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lola_ft.adapters import add_adapter, save_adapter
from lola_ft.adapters.checksums import CHECKSUMS_KEY
from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.load_save import plain_name
from lola_ft.adapters.on_disk import read_adapter
from lola_ft.adapters.stored_settings import settings_of
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.files import sha256_of
from lola_ft.merging import merge
from lola_ft.quantization import load, load_base
from lola_ft.recipe import Recipe, load_recipe
from lola_ft.training.base_model import adapter_settings, load_with_adapter
from lola_ft.training.setup import fit_to_base
from tests.conftest import Outcome, assert_says, make_base
from tests.families.moe import make_moe
from tests.training.checkpointing.test_resume import assert_same_run, run_child
from tests.training.conftest import recipe_dict

QUICK: dict[str, Any] = {"max_steps": 2, "grad_accum_steps": 1, "optimizer": "adamw"}
# What an adapter was trained with, of each family: the second run must find it out.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "alphas": {"adapter": {"attention": {"rank": 2, "alpha": 3.0}, "experts": {"rank": 8}, "mlp": {"rank": 1}}},
    "rslora": {"adapter": {"variant": "rslora"}},
    "dora": {"adapter": {"variant": "dora"}},
    "loftq": {"adapter": {"init": "loftq"}},
    "trained too": {"adapter": {"norms": True, "biases": True}, "router": {"mode": "tuned"}},
    "router": {"router": {"mode": "lora", "rank": 3}},
    "some experts": {"adapter": {"experts": {"rank": 4, "select": [[0, 2], [1]]}}},
    "some experts, biases": {"adapter": {"experts": {"rank": 4, "select": [[0, 2], []]}, "biases": True}},
    "attention": {"adapter": {"mlp": None, "experts": None}},
    "special tokens": {"data": {"special_tokens": ["<|im_start|>", "<|im_end|>"]}},
}


class Stages:
    """Writes recipes for a base and runs them."""

    def __init__(self, folder: Path, base: Path, rows: Path, verb: Callable[..., Outcome]) -> None:
        self.folder, self.base, self.rows, self.verb = folder, base, rows, verb

    def write(self, name: str, **changes: Any) -> Path:
        changes["train"] = QUICK | changes.get("train", {})
        recipe = recipe_dict(self.base, self.rows, self.folder / name, **changes)
        recipe["adapter"] = {key: value for key, value in recipe["adapter"].items() if value is not None}
        YAML().dump(recipe, self.folder / f"{name}.yaml")
        return self.folder / f"{name}.yaml"

    def next(self, name: str, start: Any, **changes: Any) -> Path:
        """A recipe that goes on from `start` and leaves all that the adapter knows to it."""
        path = self.write(name, **changes)
        recipe = YAML(typ="safe").load(path)
        recipe["adapter"] = {"continue_from": str(start), "dropout": 0.0} | changes.get("adapter", {})
        recipe["router"] = changes.get("router", {})
        YAML().dump(recipe, path)
        return path

    def train(self, recipe: Path, *arguments: str) -> Path:
        outcome = self.verb("train", str(recipe), *arguments)
        assert outcome.code == 0, outcome.err
        return self.folder / recipe.stem

    def refused(self, recipe: Path, *arguments: str) -> str:
        outcome = self.verb("train", str(recipe), *arguments)
        assert outcome.code == 2, outcome.out
        return outcome.err


@pytest.fixture
def stages(tmp_path: Path, tiny_base: Path, rows_file: Path, verb: Callable[..., Outcome]) -> Stages:
    return Stages(tmp_path, tiny_base, rows_file, verb)


@pytest.fixture
def of_olmoe(tmp_path: Path, rows_file: Path, verb: Callable[..., Outcome]) -> Stages:
    return Stages(tmp_path, make_moe(tmp_path / "olmoe", "olmoe"), rows_file, verb)


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def resolved(run: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(run / "recipe.yaml")


# Starting at the adapter's weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_second_stage_starts_where_the_first_ended(kind: str, stages: Stages) -> None:
    """With a learning rate of next to nothing the weights stay; the settings are the first recipe's."""
    first = stages.train(stages.write("first", **KINDS[kind]))
    recipe = stages.next("second", first, train={"learning_rate": 1e-30, "max_steps": 1})
    second = stages.train(recipe)
    before, after = weights_of(first / "adapter"), weights_of(second / "adapter")
    assert before.keys() == after.keys()
    for name in before:  # a zero moves as far as the rate
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-28)
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (first, second)]
    assert configs[0] == configs[1]
    metadata = [read_adapter(run / "adapter").metadata | {CHECKSUMS_KEY: ""} for run in (first, second)]
    assert metadata[0] == metadata[1]
    was, now = resolved(first), resolved(second)
    assert {**was["adapter"], "continue_from": str(first)} == now["adapter"]
    assert now["router"] == was["router"]


@pytest.mark.slow
def test_a_stage_trains_all_that_the_first_has_trained(stages: Stages) -> None:
    first = stages.train(stages.write("first", **KINDS["trained too"]))
    second = stages.train(stages.next("second", first))
    before, after = weights_of(first / "adapter"), weights_of(second / "adapter")
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "lora_" not in name and "experts" not in name]
    assert manifest(first)["trained"] == manifest(second)["trained"]
    assert manifest(second)["trained"].keys() >= {"attention", "mlp", "experts", "router", "norms", "biases"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["peft", "per_expert"])
def test_a_stage_of_another_family_starts_from_either_layout(layout: str, of_olmoe: Stages) -> None:
    groups = {"mlp": None, "attention": {"rank": 4}, "experts": {"rank": 4}}
    first = of_olmoe.train(of_olmoe.write("first", adapter=groups))
    convert_adapter(first / "adapter", of_olmoe.base, layout, of_olmoe.folder / layout)
    recipe = of_olmoe.next("second", of_olmoe.folder / layout, train={"learning_rate": 1e-30})
    before, after = weights_of(first / "adapter"), weights_of(of_olmoe.train(recipe) / "adapter")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_special_tokens_come_from_the_adapter_and_other_ones_are_refused(stages: Stages) -> None:
    first = stages.train(stages.write("first", **KINDS["special tokens"]))
    second = stages.train(stages.next("second", first))
    assert resolved(second)["data"]["special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    rows = next(name for name in weights_of(first / "adapter") if "trainable_tokens" in name)
    assert weights_of(second / "adapter")[rows].shape == (2, 64)
    error = stages.refused(stages.next("third", first, data={"special_tokens": ["<|im_end|>"]}))
    assert_says(error, "data.special_tokens: <|im_end|> in the recipe, <|im_end|>, <|im_start|> in the adapter")


@pytest.mark.slow
def test_the_recipe_of_the_run_runs_again_as_it_is(stages: Stages) -> None:
    """Also with an alpha that the recipe gives to a group, though it is the common one."""
    first = stages.train(stages.write("first", **KINDS["alphas"]))
    second = stages.train(stages.next("second", first, adapter={"mlp": {"rank": 1, "alpha": 8.0}}))
    again = stages.train(second / "recipe.yaml", f"output={stages.folder / 'again'}").parent / "again"
    assert resolved(again)["adapter"] == resolved(second)["adapter"]
    name = "adapter_model.safetensors"
    assert (again / "adapter" / name).read_bytes() == (second / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_kept_its_best_goes_on_from_that(stages: Stages) -> None:
    best = {"keep_best": True, "eval_every": 1, "max_steps": 3, "learning_rate": 0.5}
    first = stages.train(stages.write("first", data={"validation": 0.2}, train=best))
    assert manifest(first)["results"]["best_step"] < 3
    stages.train(stages.next("second", first))
    name = "adapter_model.safetensors"
    assert (stages.folder / "second" / "start" / name).read_bytes() == (first / "adapter" / name).read_bytes()


def test_an_adapter_of_stock_peft_goes_on_where_it_is(of_olmoe: Stages) -> None:
    """It has LoRA on two of attention's four projections, and names neither fingerprint nor template."""
    stock = AutoModelForCausalLM.from_pretrained(of_olmoe.base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(stock, config).save_pretrained(of_olmoe.folder / "stock")
    second = of_olmoe.train(of_olmoe.next("second", of_olmoe.folder / "stock"))
    assert weights_of(second / "adapter").keys() == weights_of(of_olmoe.folder / "stock").keys()
    assert resolved(second)["adapter"]["attention"] == {"rank": 4}
    assert any(tensor.any() for name, tensor in weights_of(second / "adapter").items() if "lora_B" in name)


# What is kept of the stages


@pytest.mark.slow
def test_manifest_card_and_merge_report_keep_the_chain(stages: Stages) -> None:
    first = stages.train(stages.write("first"))
    second = stages.train(stages.next("second", first))
    third = stages.train(stages.next("third", second / "adapter", train={"learning_rate": 0.002}))
    chain = manifest(third)["stages"]
    assert [stage["run"] for stage in chain] == ["first", "second", "third"]
    starts = [stage["started_from"] for stage in chain]
    assert starts[0] is None
    assert [start["adapter"] for start in starts[1:]] == ["first", "adapter"]
    assert chain[2]["learning_rate"] == 0.002
    assert starts[1]["sha256"] == sha256_of(first / "adapter" / "adapter_model.safetensors")
    assert "## Stages" in (third / "README.md").read_text()
    assert "| 2 | second | first (`" in (third / "README.md").read_text()
    assert "## Stages" not in (first / "README.md").read_text()
    merged = stages.folder / "merged"
    report = merge(stages.base, third / "adapter", merged, check="none")
    assert report.stages == chain == json.loads((merged / "merge_report.json").read_text())["stages"]
    assert "| 3 | third | adapter (`" in (merged / "README.md").read_text()


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_a_stage(stages: Stages) -> None:
    """Its manifest lists no stages."""
    first = stages.train(stages.write("first"))
    content = manifest(first)
    del content["stages"]
    (first / "manifest.json").write_text(json.dumps(content))
    second = stages.train(stages.next("second", first))
    assert [(stage["run"], stage["steps"]) for stage in manifest(second)["stages"]] == [("first", 2), ("second", 2)]


# What is refused


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("lora", {"adapter": {"attention": {"rank": 8}}}, "adapter.attention.rank: 8 in the recipe, 4 in the adapter"),
        ("lora", {"adapter": {"alpha": 16.0}}, "adapter.alpha: 16 in the recipe, 8.0 for attention in the adapter"),
        ("lora", {"adapter": {"variant": "rslora"}}, "adapter.variant: rslora in the recipe, lora in the adapter"),
        ("lora", {"adapter": {"norms": True}}, "adapter.norms: true in the recipe, false in the adapter"),
        ("lora", {"adapter": {"init": "gaussian"}}, "adapter.init: gaussian in the recipe, default in the adapter"),
        ("lora", {"router": {"mode": "tuned"}}, "router.mode: tuned in the recipe, frozen in the adapter"),
        ("lora", {"adapter": {"experts": {"rank": 4, "select": [[0], [1]]}}}, "select: 2 experts of 2 layers … all"),
        ("attention", {"adapter": {"mlp": {"rank": 8}}}, "adapter.mlp: rank 8 in the recipe, none in the adapter"),
        ("router", {"router": {"mode": "lora", "rank": 4}}, "router.rank: 4 in the recipe, 3 in the adapter"),
    ],
)
def test_settings_that_differ_are_refused_by_key(
    kind: str, changes: dict[str, Any], message: str, stages: Stages, made: Callable[[str], Path]
) -> None:
    error = stages.refused(stages.next("second", made(kind), **changes))
    assert_says(error, f"adapter.continue_from: … was trained with other settings. … {message} … Remove these keys.")
    assert not (stages.folder / "second").exists()


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make an adapter of a kind, without training; each is made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(kind: str) -> Path:
        if not (folder / kind).exists():
            recipe = recipe_dict(tiny_base, Path("unused.jsonl"), folder, **KINDS[kind])
            recipe["adapter"] = {key: value for key, value in recipe["adapter"].items() if value is not None}
            settings = adapter_settings(Recipe.model_validate(recipe))
            base = load_base(tiny_base, "nf4", "float32", "cpu", quiet=True)
            save_adapter(add_adapter(base, settings), folder / kind)
        return folder / kind

    return make


def test_all_differences_are_said_at_once(stages: Stages, made: Callable[[str], Path]) -> None:
    changes = {"adapter": {"attention": {"rank": 8}, "biases": True}, "router": {"mode": "tuned"}}
    error = stages.refused(stages.next("second", made("lora"), **changes))
    assert_says(error, "adapter.attention.rank … adapter.biases … router.mode")


def test_the_same_settings_may_be_said_again(stages: Stages, made: Callable[[str], Path]) -> None:
    groups = {
        "attention": {"rank": 4},
        "mlp": {"rank": 8},
        "experts": {"rank": 4, "select": [[3, 2, 1, 0], [0, 1, 2, 3]]},
    }
    recipe = stages.next("second", made("lora"), adapter={**groups, "alpha": 8.0, "variant": "lora"})
    assert stages.verb("train", str(recipe), "--dry-run").code == 0


def test_dropout_is_the_recipes(stages: Stages, made: Callable[[str], Path]) -> None:
    groups = {"dropout": 0.25, "experts": {"rank": 4, "dropout": 0.5}}
    recipe, base = fit_to_base(
        load_recipe(stages.next("second", made("lora"), adapter=groups)), Console(quiet=True), weights=True
    )
    model, _ = load_with_adapter(base, recipe, torch.float32, torch.device("cpu"), Console(quiet=True))
    held = {plain_name(name): module for name, module in model.named_modules() if hasattr(module, "lora_dropout")}
    assert held["transformer.h.0.attn.c_attn"].lora_dropout["default"].p == 0.25
    experts = [module.dropout_of["default"] for module in held.values() if hasattr(module, "dropout_of")]
    assert set(experts) == {0.5}


def test_another_base_is_refused_before_it_is_loaded(
    stages: Stages, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stages.next("second", made("lora"))
    monkeypatch.setattr(load, "load_checkpoint", lambda *_: pytest.fail("the base was loaded"))
    stages.base = make_base(stages.folder / "other", seed=1)
    error = stages.refused(recipe, f"base.model={stages.base}")
    assert_says(error, "adapter.continue_from: … was trained on base … is … Set base.model to the adapter's own base.")


def test_a_damaged_adapter_is_refused_before_the_base_is_opened(stages: Stages, made: Callable[[str], Path]) -> None:
    broken = stages.folder / "broken"
    shutil.copytree(made("lora"), broken)
    file = broken / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    recipe = stages.next("second", broken)
    for name in ("train", "plan", "preview"):
        outcome = stages.verb(name, str(recipe), f"base.model={stages.folder / 'nowhere'}")
        assert outcome.code == 2
        assert_says(outcome.err, f"{file}: 1 tensors do not hold the numbers that were written")


@pytest.mark.slow
def test_what_is_no_adapter_is_refused(stages: Stages) -> None:
    assert_says(stages.refused(stages.next("a", stages.base)), "adapter.continue_from: … neither a run nor an adapter.")
    assert_says(stages.refused(stages.next("b", stages.folder / "none")), "adapter.continue_from: … no such folder")
    stages.train(stages.write("run"))
    shutil.rmtree(stages.folder / "run" / "adapter")
    assert_says(stages.refused(stages.next("c", stages.folder / "run")), "this run has no adapter yet")
    inside = stages.folder / "run" / "checkpoints" / "step-2"
    assert_says(
        stages.refused(stages.next("d", inside)), f"neither a run nor an adapter. Did you mean {inside}/adapter?"
    )


@pytest.mark.slow
def test_loftq_goes_on_only_in_4_bit(stages: Stages) -> None:
    first = stages.train(stages.write("first", **KINDS["loftq"]))
    recipe = stages.next("second", first)
    assert_says(stages.refused(recipe, "base.quantization=none"), "base.quantization: … Set base.quantization=nf4.")
    assert stages.verb("train", str(recipe), "--dry-run").code == 0
    assert read_adapter(stages.train(recipe) / "adapter").starts_at_rounding_error


@pytest.mark.slow
def test_another_template_is_warned_about(stages: Stages) -> None:
    first = stages.train(stages.write("first"))
    warning = "data.template plain is not the template that"
    for name in ("preview", "plan"):
        recipe = stages.next(name, first)
        assert warning not in stages.verb(name, str(recipe)).out
        outcome = stages.verb(name, str(recipe), "data.template=plain", f"output={stages.folder / name}2")
        assert warning in outcome.out + outcome.err


def test_a_revision_belongs_to_an_adapter_on_the_hub(stages: Stages, made: Callable[[str], Path]) -> None:
    recipe = stages.next("second", made("lora"))
    assert_says(stages.refused(recipe, "adapter.revision=main"), "adapter.revision: … Remove it.")
    error = stages.refused(recipe, "adapter.continue_from=null", "adapter.revision=main")
    assert_says(error, "adapter.revision: belongs to continue_from")


# An adapter on the Hub


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_pinned_to_its_commit(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then, later = "a" * 40, "b" * 40
    first = stages.train(stages.write("first"))
    repo = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(first / "adapter", repo / "snapshots" / then)
    shutil.copyfile(first / "manifest.json", repo / "snapshots" / then / "manifest.json")  # as a publication has it
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(then)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = stages.next("second", "someone/adapter")
    second = stages.train(recipe)
    assert resolved(second)["adapter"]["revision"] == then
    chain = manifest(second)["stages"]
    assert [stage["run"] for stage in chain] == ["first", "second"]
    assert (chain[1]["started_from"]["adapter"], chain[1]["started_from"]["revision"]) == ("someone/adapter", then)
    (repo / "refs" / "main").write_text(later)  # and nothing of that commit is here
    assert "nothing is left to do" in stages.verb("train", str(recipe), "--resume").out
    again = stages.train(second / "recipe.yaml", f"output={tmp_path / 'again'}").parent / "again"
    assert weights_equal(again, second)


def weights_equal(one: Path, other: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


# Killed and resumed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained too", "dora", "loftq", "some experts"])
def test_a_killed_stage_resumes_without_the_first(kind: str, stages: Stages) -> None:
    first = stages.train(stages.write("first", **KINDS[kind]))
    changes = {"train": {"max_steps": 4, "save_every": 2}, "data": {"validation": 0.2}, "adapter": {"dropout": 0.1}}
    assert run_child(stages.next("whole", first, **changes)).code == 0
    cut = stages.next("cut", first, **changes)
    assert run_child(cut, moment="logged", step=3).code == -signal.SIGKILL
    first.rename(stages.folder / "gone")
    resumed = run_child(cut, "--resume")
    assert resumed.code == 0, resumed.out
    assert "Going on from step 2" in resumed.out
    assert_same_run(stages.folder / "cut", stages.folder / "whole")
    assert manifest(stages.folder / "cut")["stages"][0] == manifest(stages.folder / "whole")["stages"][0]


@pytest.mark.slow
def test_the_start_of_a_run_cannot_change(stages: Stages, made: Callable[[str], Path]) -> None:
    recipe = stages.next("second", made("lora"))
    stages.train(recipe)
    other = stages.folder / "other"
    shutil.copytree(made("lora"), other)
    for start in ([f"adapter.continue_from={other}"], ["adapter.continue_from=null", "adapter.attention.rank=4"]):
        error = stages.refused(recipe, *start, "--resume", "--allow-changed", "adapter")
        assert_says(error, "adapter.continue_from was … a run cannot change its start")


# Plans


def test_a_plan_counts_the_adapter_that_is_continued(stages: Stages, made: Callable[[str], Path]) -> None:
    fresh = stages.write("fresh", **KINDS["some experts, biases"])
    plans = [
        json.loads(stages.verb("plan", str(recipe), "--json").out)
        for recipe in (fresh, stages.next("second", made("some experts, biases")))
    ]
    assert plans[0]["parts"] == plans[1]["parts"]
    assert plans[0]["adapter_file_bytes"] == plans[1]["adapter_file_bytes"]


def test_a_plan_does_not_suggest_other_ranks(stages: Stages, made: Callable[[str], Path]) -> None:
    """Though those of a fresh adapter would make it fit."""
    fresh = stages.write("fresh")
    ranks = [f"adapter.{group}.rank=1" for group in ("attention", "mlp", "experts")]
    small = ["train.micro_batch_size=1", "train.gradient_checkpointing=true", *ranks]
    room = json.loads(stages.verb("plan", str(fresh), *small, "--gpu", "8GB", "--json").out)["peak_bytes"]
    suggestions = [
        json.loads(stages.verb("plan", str(recipe), "--gpu", str(room), "--json").out)["suggestion"]
        for recipe in (fresh, stages.next("second", made("lora")))
    ]
    assert "adapter.attention.rank=1" in suggestions[0]["overrides"]
    assert suggestions[1] is None


def test_an_adapter_on_part_of_a_group_has_its_largest_rank(tiny_base: Path, tiny_adapter: Path) -> None:
    """Other tools write such adapters; the group's rank is the largest."""
    architecture = BaseCheckpoint.open(tiny_base).architecture
    weights = read_adapter(tiny_adapter).weights(architecture)
    weights.pairs = {module: pair for module, pair in weights.pairs.items() if module.endswith(("c_attn", "0.c_fc"))}
    settings = settings_of(weights)
    assert settings.ranks() == {"attention": 4, "experts": 4}
    assert settings.selection == ((0,), (0,))
