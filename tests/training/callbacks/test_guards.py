"""Guards skip, warn and stop in a real run of a tiny base; their measurements are exact."""

import json
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AutoTokenizer, TrainerControl, TrainerState

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.errors import UserError
from lola_ft.model.layers import LolaMoe
from lola_ft.quantization import load_base
from lola_ft.recipe import load_recipe
from lola_ft.routing.measures import largest_share, load_entropy
from lola_ft.training import train
from lola_ft.training.callbacks.alarm import Alarm
from lola_ft.training.callbacks.best_evaluation import BestEvaluation
from lola_ft.training.callbacks.loss_guards import LossSpike, spike_limit
from lola_ft.training.callbacks.router_guards import ENTROPY, SHARE, RouterCollapse, RouterLoad, RouterProbe
from lola_ft.training.dataset import training_examples
from lola_ft.training.reports.metrics import MetricsFile, read_metrics
from lola_ft.training.trainers import nonfinite_steps
from lola_ft.training.trainers.batch_rows import documents_of, find_rows
from lola_ft.training.trainers.sft import SftTrainer
from tests.conftest import alpaca_rows, write_rows
from tests.grids import slow_but

WEIGHTS = Path("adapter/adapter_model.safetensors")


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of some steps' first micro batch NaN, with the gradients that follow."""
    original = SftTrainer.compute_loss

    def compute_loss(self: SftTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        first = not self.nonfinite.micro_batches
        bad = self.model.training and first and self.state.global_step + 1 in steps
        return loss * float("nan") if bad else loss

    monkeypatch.setattr(SftTrainer, "compute_loss", compute_loss)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch, {2, 4})
    adapters = tmp_path / "run" / "checkpoints"
    train(load_recipe(recipe_file(train={"max_steps": 4, "save_every": 1, "keep": 4, "log_every": 1})))
    states = [load_file(adapters / f"step-{n}" / "state.safetensors") for n in (1, 2, 3, 4)]
    weights = [load_file(adapters / f"step-{n}" / WEIGHTS) for n in (1, 2, 3, 4)]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name
        assert torch.equal(weights[3][name], weights[2][name]), name
    assert any(not torch.equal(weights[2][name], tensor) for name, tensor in weights[0].items())
    for state in states:
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line}
    assert lines[2]["grad_norm"] is None
    assert "loss" not in lines[2]
    assert [lines[step].get("skipped_steps") for step in (1, 2, 3, 4)] == [None, 1, None, 2]
    results = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]
    assert results["skipped_steps"] == 2
    assert results["mean_loss"] == pytest.approx(statistics.mean(lines[n]["loss"] for n in (1, 3)), abs=1e-5)


@pytest.mark.slow
def test_a_mean_of_several_steps_leaves_the_skipped_ones_out(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(monkeypatch, {3})
    for log_every in (1, 4):
        output = str(tmp_path / f"every{log_every}")
        train(load_recipe(recipe_file(train={"max_steps": 4, "log_every": log_every}, output=output)))
    each, at_once = (
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line}
        for name in ("every1", "every4")
    )
    # transformers logs the first step in any case
    assert at_once[4] == pytest.approx(statistics.mean(each[step] for step in (2, 4)), abs=1e-5)


@pytest.mark.parametrize("packing", slow_but([True], [True, False]))
def test_too_many_in_a_row_end_the_run_and_name_the_rows(
    recipe_file: Callable[..., Path],
    verb: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    packing: bool,
) -> None:
    poison(monkeypatch, {2, 3})
    fed: list[list[tuple[int, ...]]] = []
    documents = nonfinite_steps.documents_of
    monkeypatch.setattr(nonfinite_steps, "documents_of", lambda inputs: fed.append(documents(inputs)) or fed[-1])
    rows = write_rows(tmp_path / "rows.jsonl", [row | {"input": f"{i}"} for i, row in enumerate(alpaca_rows(40))])
    sources = [{"path": str(rows), "format": "alpaca", "language_column": "language"}]
    data = {"sources": sources, "template": "plain", "max_length": 40, "packing": packing}
    path = recipe_file(data=data, train={"max_steps": 6, "save_every": 1}, guards={"max_nonfinite": 2})
    outcome = verb("train", path)
    assert outcome.code == 2
    assert "step 3: the loss or its gradient was not finite, 2 in a row (guards.max_nonfinite is 2)" in outcome.err
    assert "Traceback" not in outcome.err
    [batch] = fed
    tokenizer = AutoTokenizer.from_pretrained(load_recipe(path).base.model)
    for document in batch:
        text = tokenizer.decode(document)
        line = next(i for i, row in enumerate(alpaca_rows(40)) if f"{row['instruction']}\n\n{i}" in text.split("=")[0])
        assert f"rows.jsonl:{line + 1}" in outcome.err.replace("\n", " ")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-1", "step-2"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_spike_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard = LossSpike(6.0, Alarm("loss_spike", MetricsFile(tmp_path / "metrics.jsonl")))
    losses = [2.0 + 0.01 * (i % 3) for i in range(12)] + [4.0, 4.1, 2.0, 3.9]
    for step, loss in enumerate(losses, start=1):
        state = TrainerState(global_step=step)
        if step == 14:  # as after a resume
            stored, guard = (
                guard.state_dict(),
                LossSpike(6.0, Alarm("loss_spike", MetricsFile(tmp_path / "metrics.jsonl"))),
            )
            guard.load_state_dict(json.loads(json.dumps(stored)))
        guard.on_log(None, state, TrainerControl(), {"loss": loss})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [13, 16]
    assert "Step 13: the loss is 4" in capsys.readouterr().err
    assert spike_limit(deque([2.0] * 9), 6.0) is None
    assert spike_limit(deque([2.0] * 10), 6.0) == pytest.approx(2.0 + 6 * 0.04)


def tiny_model(base: Path, checkpointing: bool) -> Any:
    model = add_adapter(
        load_base(base, None, "float32", "cpu", quiet=True),
        AdapterSettings(attention_rank=4, expert_rank=4, alpha=8.0, dropout=0.0),
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_counts_each_real_token_once(tiny_base: Path, checkpointing: bool) -> None:
    model = tiny_model(tiny_base, checkpointing)
    load = RouterLoad(model)
    ids = torch.randint(6, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    load.token_mask_T = mask.reshape(-1).bool()
    with set_checkpoint_early_stop(False):  # else a recomputation ends before the layer's last hook
        out = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
        out.loss.backward()
    assert load.layers == [1, 3]
    for place, logits in enumerate(out.router_logits):
        expected = torch.bincount(logits.argmax(dim=-1)[load.token_mask_T], minlength=4)
        assert torch.equal(load.counts_ME[place], expected)
    assert load.counts_ME.sum(dim=1).tolist() == [19, 19]
    counts = load.counts_ME.clone()
    model.eval()
    model(input_ids=ids)
    assert torch.equal(load.counts_ME, counts)
    line = load.read()
    assert line["router_min_entropy"] == load_entropy(counts).min().item()
    assert line["router_max_share"] == largest_share(counts).max().item()
    assert line["router_dead"] == (counts == 0).sum().item()
    assert line[f"{SHARE}/3"] == pytest.approx(largest_share(counts[1]).item(), abs=1e-4)
    assert load.counts_ME.sum() == 0
    assert load.read() == {}


@pytest.mark.parametrize(("stop", "frozen"), [(False, False), (True, False), (True, True)])
def test_a_collapsed_router_is_said_or_ends_the_run(tiny_base: Path, tmp_path: Path, stop: bool, frozen: bool) -> None:
    model = tiny_model(tiny_base, checkpointing=False)
    load = RouterLoad(model)
    guard = RouterCollapse(0.2, 0.9, 4, stop, Alarm("router_collapse", MetricsFile(tmp_path / "metrics.jsonl")), frozen)
    ids = torch.randint(6, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    moe = [module for module in model.modules() if isinstance(module, LolaMoe)][1]

    def collapse(module: Any, args: Any, scores_TE: Tensor) -> Tensor:  # noqa: ARG001
        return scores_TE + torch.tensor([0.0, 100.0, 0.0, 0.0])

    def log(step: int) -> dict[str, float]:
        model(input_ids=ids)
        logs = load.read()
        guard.on_log(None, TrainerState(global_step=step), TrainerControl(), logs)
        return logs

    assert log(1)[f"{ENTROPY}/3"] > 0.2
    moe.gate.register_forward_hook(collapse)
    if stop:
        with pytest.raises(UserError, match="step 2: the router of layer 3 has collapsed") as refused:
            log(2)
        assert ("set router.mode: frozen" in str(refused.value)) is not frozen
    else:
        assert log(2)["router_max_share"] == 1.0
        log(3)
        [line] = read_metrics(tmp_path / "metrics.jsonl")
        assert (line["step"], line["warning"]) == (2, "router_collapse")


def test_flip_rate_is_that_of_the_probe(tiny_base: Path) -> None:
    model = tiny_model(tiny_base, checkpointing=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    probe = RouterProbe(model, tokenizer)
    assert learns == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.training
    assert probe.flip_rate() == 0.0
    before = probe._choices(torch.no_grad())
    for name, parameter in model.named_parameters():  # the routers stay; what they read does not
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3, generator=torch.Generator().manual_seed(0))
    after = probe._choices(torch.no_grad())
    assert probe.flip_rate() == pytest.approx((before != after).double().mean().item())
    assert probe.flip_rate() > 0.02
    with model.disable_adapter():
        assert torch.equal(probe._choices(torch.no_grad()), before)


def test_documents_of_a_batch_lead_to_their_rows(recipe_file: Callable[..., Path]) -> None:
    recipe = load_recipe(recipe_file())
    tokenizer = AutoTokenizer.from_pretrained(recipe.base.model)
    template = lola_ft.data.Template.load(recipe.data.template)
    encoded = lola_ft.data.encode(list(training_examples(recipe.data))[:3], tokenizer, template, 128)
    first, second, third = (tuple(ids) for ids in encoded.dataset["input_ids"])
    width = len(first) + len(second) + 2
    packed = {
        "input_ids": torch.tensor([[*first, *second, 0, 0], [*third, *[0] * (width - len(third))]]),
        "position_ids": torch.tensor(
            [[*range(len(first)), *range(len(second)), 0, 0], [*range(len(third)), *[0] * (width - len(third))]]
        ),
        "attention_mask": torch.tensor([[1] * (width - 2) + [0, 0], [1] * len(third) + [0] * (width - len(third))]),
    }
    documents = documents_of(packed)
    assert documents == [first, second, third]
    rows = find_rows([third, first], training_examples(recipe.data), tokenizer, template, 128, "drop")
    assert [row.rpartition(":")[2] for row in rows] == ["3", "1"]


def test_best_follows_only_the_evaluations_of_training() -> None:
    best, control = BestEvaluation(patience=2, min_delta=0.1), TrainerControl()

    def evaluate(step: int, loss: float) -> None:
        best.on_evaluate(None, TrainerState(global_step=step), control, {"eval_loss": loss})

    best.on_train_begin(None, TrainerState(), control)
    evaluate(0, 1.0)
    assert best.step is None
    for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.5), (4, 2.45), (4, 2.45)):
        evaluate(step, loss)
    assert (best.step, best.value, best.stopped) == (3, 2.5, False)
    again = BestEvaluation(patience=2, min_delta=0.1)
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    best = again
    best.on_train_begin(None, TrainerState(), control)
    evaluate(5, 2.6)
    assert best.stopped
    assert control.should_training_stop
