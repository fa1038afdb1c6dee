"""DPO and KTO: the reference is the base, the first loss is known, training moves answers apart, rows are checked."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.data import Source, Template, encode_judged, read_examples
from lola_ft.errors import DataError, RecipeError
from lola_ft.quantization import load_base
from lola_ft.recipe import load_recipe
from lola_ft.training.dataset import prepare
from lola_ft.training.precision import choose_precision
from lola_ft.training.trainers.arguments import training_arguments
from lola_ft.training.trainers.preference import DpoTrainer, KtoTrainer
from tests.conftest import Outcome, write_rows
from tests.training.conftest import recipe_dict

EOS = 5
NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PAIRS = [{"prompt": f"Name {i}", "chosen": NAMES[i], "rejected": NAMES[i - 3], "lang": "sw"} for i in range(8)]
TRAINED_TOO = {"tune_router": True, "tune_norms": True, "tune_biases": True}
JUDGED = [
    {"prompt": f"Name {i}", "completion": NAMES[i - 3 * (i % 2)], "label": i % 2 == 0, "lang": "sw"} for i in range(8)
]


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """A recipe of an objective on its rows."""

    def write(objective: str, **train: Any) -> Path:
        rows = write_rows(tmp_path / f"{objective}.jsonl", PAIRS if objective == "dpo" else JUDGED)
        form = "preference" if objective == "dpo" else "unpaired_preference"
        recipe = recipe_dict(tiny_base, rows, tmp_path / objective, objective=objective)
        recipe["data"]["sources"] = [{"path": str(rows), "format": form, "language_column": "lang"}]
        recipe["train"] |= {"micro_batch_size": 4, "grad_accum_steps": 2, "optimizer": "adamw"} | train
        path = tmp_path / f"{objective}.yaml"
        YAML().dump(recipe, path)
        return path

    return write


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_dpo_starts_at_ln_2_and_raises_the_margin(
    recipe_of: Callable[..., Path], verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = verb("train", str(recipe_of("dpo", max_steps=12, learning_rate=0.02)))
    assert done.code == 0, done.err
    lines = [line for line in metrics(tmp_path / "dpo") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == 0
    assert lines[-1]["rewards/margins"] > 0.3
    assert lines[-1]["rewards/accuracies"] == 1
    assert lines[-1]["loss"] < 0.6
    assert json.loads((tmp_path / "dpo" / "manifest.json").read_text())["recipe"]["objective"] == "dpo"
    assert (tmp_path / "dpo" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_bases_own_dropout_is_off(
    recipe_of: Callable[..., Path], tiny_base: Path, verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    """LOLA has 0.1 everywhere, in attention too, where it is no module."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    dropout = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    (base / "config.json").write_text(json.dumps(config | dropout))
    done = verb("train", str(recipe_of("dpo", max_steps=1)), f"base.model={base}", "train.reference_pass=beside")
    assert done.code == 0, done.err
    assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_kto_starts_at_a_half_and_moves_good_from_bad(
    recipe_of: Callable[..., Path], verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = verb("train", str(recipe_of("kto", max_steps=8, learning_rate=0.05)))
    assert done.code == 0, done.err
    lines = [line for line in metrics(tmp_path / "kto") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert (lines[0]["rewards/chosen"], lines[0]["rewards/rejected"], lines[0]["kl"]) == (0, 0, 0)
    assert lines[-1]["rewards/margins"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_resumed_run_is_the_same_run(
    objective: str, recipe_of: Callable[..., Path], verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    """From the checkpoint of step 3, which lies within the second epoch."""
    recipe = recipe_of(objective, max_steps=4, save_every=3, grad_accum_steps=1)
    run, whole = tmp_path / objective, tmp_path / "whole"
    assert verb("train", str(recipe)).code == 0
    shutil.copytree(run, whole)
    for name in ("manifest.json", "README.md"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-4")
    resumed = verb("train", str(recipe), "--resume")
    assert "Going on from step 3" in resumed.out, resumed.err
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    assert without_times(run) == without_times(whole)


def without_times(run: Path) -> list[dict[str, Any]]:
    times = ("runtime", "per_second", "per_s")
    return [{key: line[key] for key in line if not key.endswith(times)} for line in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_rewards_are_measured_from_the_model_without_its_adapter(
    objective: str, recipe_of: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    """With LoRA, norms, biases and router all moved away from the base; log-probabilities here from whole logits."""
    recipe = load_recipe(recipe_of(objective))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    data = prepare(recipe.data, tokenizer, seed=0)
    base = load_base(tiny_base, "nf4", "float32", "cpu", quiet=True)
    settings = AdapterSettings(attention_rank=4, mlp_rank=8, expert_rank=4, alpha=8.0, dropout=0.0, **TRAINED_TOO)
    model = add_adapter(base, settings)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    precision = choose_precision("float32", torch.device("cpu"))
    arguments = training_arguments(recipe, tmp_path, precision, torch.device("cpu"), steps=1, evaluate=False)
    kind = DpoTrainer if objective == "dpo" else KtoTrainer
    trainer = kind(model=model, args=arguments, train_dataset=data.mix.dataset, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    trainer.compute_loss(model, batch)
    logs = trainer._metrics["train"]
    gained = log_probs(model, batch)
    with model.disable_adapter():
        gained = gained - log_probs(model, batch)
    good = torch.arange(len(gained)) < len(gained) // 2 if objective == "dpo" else batch["label"].bool()
    assert logs["rewards/chosen"][0] == pytest.approx(0.1 * gained[good].mean().item(), rel=1e-4)
    assert logs["rewards/rejected"][0] == pytest.approx(0.1 * gained[~good].mean().item(), rel=1e-4)
    assert gained.abs().max() > 0.1
    assert list(model.peft_config) == ["default"]


@torch.no_grad()
def log_probs(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    """Each sequence's log-probability of its answer."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:, None]
    picked = logits.log_softmax(-1).gather(-1, targets)[..., 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(-1)


def read(path: Path, form: str, rows: list[dict[str, Any]], **source: Any) -> list[Any]:
    file = write_rows(path / "rows.jsonl", rows)
    return list(read_examples([Source(form, path=str(file), language="sw", **source)]))


def test_both_answers_end_and_messages_say_the_same_as_texts(tmp_path: Path, tiny_base: Path) -> None:
    ask, answer = {"role": "user", "content": "Name 1"}, {"role": "assistant", "content": "one"}
    other = {"role": "assistant", "content": "two"}
    rows: list[dict[str, Any]] = [
        {"prompt": "Name 1", "chosen": "one", "rejected": "two"},
        {"prompt": [ask], "chosen": [answer], "rejected": [other]},
        {"prompt": "Name 1", "chosen": [ask, answer], "rejected": [ask, other]},
        {"chosen": [ask, answer], "rejected": [ask, other]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoded = encode_judged(read(tmp_path, "preference", rows), tokenizer, Template.load("chatml"), 128)
    first, *others = (dict(row) for row in encoded.dataset)
    assert all(row == first for row in others)
    assert len(others) == 3
    assert first["chosen_ids"][-1] == first["rejected_ids"][-1] == EOS
    assert tokenizer.decode(first["chosen_ids"][:-1]) == "one"
    assert tokenizer.decode(first["rejected_ids"][:-1]) == "two"
    assert tokenizer.decode(first["prompt_ids"]) == Template.load("chatml").prompt("Name 1")


def test_pairs_that_are_too_long_are_counted_by_language(tmp_path: Path, tiny_base: Path) -> None:
    rows = [*PAIRS, {"prompt": "Name 9", "chosen": "nine", "rejected": "nine " * 60}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    examples = read(tmp_path, "preference", rows)
    template = Template.load("plain")
    counts = encode_judged(examples, tokenizer, template, 64).report.languages["sw"]
    assert (counts.rows, counts.kept, counts.dropped, counts.sequences) == (9, 8, 1, 16)
    cut = encode_judged(examples, tokenizer, template, 64, "truncate")
    assert cut.report.total.truncated == 1
    longest = cut.dataset[8]
    assert len(longest["prompt_ids"]) + len(longest["rejected_ids"]) <= 64
    assert longest["rejected_ids"][-1] == EOS
    with pytest.raises(DataError, match=r"rows.jsonl:9: \d+ tokens, more than data.max_length 64"):
        encode_judged(examples, tokenizer, template, 64, "error")


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("preference", {"prompt": "a", "chosen": "b", "worse": "c"}, "Map it with `fields: {rejected: worse}`"),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "the rejected answer are the same",
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": " "}, "field 'rejected' is empty"),
        ("unpaired_preference", {"prompt": "a", "completion": "b", "label": "good"}, "must be true (a good answer) or"),
        (
            "preference",
            {
                "prompt": "x",
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": "c",
            },
            "it does not begin with the row's 'prompt'",
        ),
    ],
)
def test_wrong_rows_are_named_with_their_line(form: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, form, [row])
    assert message in str(error.value)
    assert "rows.jsonl:1: " in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.packing=true", "compares whole answers"),
        ("adapter.dropout=0.1", "dropout would add noise"),
        ("adapter.init=loftq", "loftq starts elsewhere"),
        ("router.aux_loss=0.1", "does not add the router's losses to its own loss"),
        ("objective=kto", "learns from format unpaired_preference"),
        ("objective=sft", "Set `objective: dpo` for preference"),
        ("train.loss_type=kto", "objective dpo has sigmoid"),
        ("guards.router_collapse=stop", "does not measure the router's load"),
    ],
)
def test_settings_without_meaning_are_refused(override: str, message: str, recipe_of: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_of("dpo"), [override])
    assert message in str(error.value)


def test_no_language_can_be_watched(
    recipe_of: Callable[..., Path], verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe = recipe_of("dpo", early_stopping={"metric": "eval_loss_by_language/sw"}, eval_every=1)
    outcome = verb("train", str(recipe), "data.validation=0.3")
    assert outcome.code == 2
    assert "there is no 'eval_loss_by_language/sw'. Choose one of eval_loss." in outcome.err
    assert not (tmp_path / "dpo").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_rows_of_a_batch_that_is_not_finite_are_named(
    objective: str,
    recipe_of: Callable[..., Path],
    verb: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = DpoTrainer if objective == "dpo" else KtoTrainer
    original = kind.compute_loss
    monkeypatch.setattr(kind, "compute_loss", lambda self, *args, **kwargs: original(self, *args, **kwargs) * math.nan)
    outcome = verb("train", str(recipe_of(objective, grad_accum_steps=1)), "guards.max_nonfinite=1")
    assert outcome.code == 2
    [held] = re.findall(r"The last batch held (.*?)\. Look", outcome.err)
    lines = [int(place.rpartition(":")[2]) for place in held.split(", ")]
    assert len(set(lines)) == len(lines) == 4  # a pair is two sequences of one row
