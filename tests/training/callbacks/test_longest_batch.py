"""The longest micro batch before the first step: it is the longest, leaves nothing behind, and explains itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from lola_ft.errors import UserError
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from lola_ft.training.callbacks import longest_batch
from lola_ft.training.callbacks.longest_batch import explained_out_of_memory, longest_rows
from lola_ft.training.trainers.arguments import padding_multiple
from lola_ft.training.trainers.sft import SftTrainer
from tests.conftest import write_rows


def test_the_longest_rows_are_found_whatever_their_order() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 9, 1, 7)], "labels": [[1]] * 4})
    assert longest_rows(dataset, 2) == [1, 3]
    assert longest_rows(dataset.select([3, 2, 0]), 2) == [0, 2]
    assert longest_rows(dataset, 9) == [1, 3, 0, 2]


def test_an_answer_stands_behind_its_prompt() -> None:
    """A pair is as long as its longer answer; KTO's rows are computed with another's answer, too, and stay in order."""
    ids = {
        "prompt_ids": [[1] * n for n in (4, 1, 2, 1, 5)],
        "chosen_ids": [[1], [1] * 9, [1] * 2, [1], [1]],
        "rejected_ids": [[1], [1], [1] * 6, [1], [1]],
    }
    assert longest_rows(Dataset.from_dict(ids), 2) == [1, 2]
    judged = {"prompt_ids": ids["prompt_ids"], "completion_ids": ids["chosen_ids"], "label": [True] * 5}
    assert longest_rows(Dataset.from_dict(judged), 2) == [1, 4]
    mismatched = Dataset.from_dict(judged | {"KL_completion_ids": [[1], [1], [1], [1] * 13, [1] * 14]})
    assert longest_rows(mismatched, 2) == [4, 3]
    assert longest_rows(mismatched, 2, in_order=True) == [2, 3], "the last one has a single row"
    assert longest_rows(mismatched, 9, in_order=True) == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_training_is_bit_equal_with_and_without_the_trial(
    packing: bool, recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, int]] = []
    whole = longest_batch.try_longest_batch

    def watched(trainer: SftTrainer, optimizer: str) -> int:
        longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
        tried.append((whole(trainer, optimizer), longest))
        return tried[-1][0]

    recipe = recipe_file(
        adapter={"dropout": 0.1}, router={"aux_loss": 0.01}, data={"packing": packing}, train={"optimizer": "adamw"}
    )
    monkeypatch.setattr(longest_batch, "try_longest_batch", lambda *_: 0)
    plain = train(load_recipe(recipe, [f"output={tmp_path / 'plain'}"]))
    monkeypatch.setattr(longest_batch, "try_longest_batch", watched)
    trial = train(load_recipe(recipe, [f"output={tmp_path / 'trial'}"]))
    [(tokens, longest)] = tried
    multiple = None if packing else padding_multiple(load_recipe(recipe).data.max_length, torch.device("cpu"))
    padded = longest + (-longest % multiple if multiple else 0)
    assert longest < tokens <= 2 * padded, "two rows, the longest of them among these"
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trial, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert _metrics(trial) == _metrics(plain)


JUDGED_ROWS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"prompt": f"Name {i}", "chosen": "one", "rejected": "two " * (1 + i)} for i in range(8)],
    "kto": [{"prompt": f"Name {i}", "completion": "one " * (1 + i), "label": i % 2 == 0} for i in range(8)],
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", JUDGED_ROWS)
def test_preferences_are_learned_bit_for_bit_as_without_the_trial(
    objective: str, recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that TRL counts are in every line; random numbers are drawn here, for dropout is not allowed."""
    rows = write_rows(tmp_path / "judged.jsonl", JUDGED_ROWS[objective])
    form = {"dpo": "preference", "kto": "unpaired_preference"}[objective]
    recipe = recipe_file(
        objective=objective,
        data={"sources": [{"path": str(rows), "format": form, "language": "en"}]},
        train={"optimizer": "adamw", "log_every": 1, "max_steps": 2, "micro_batch_size": 4},
    )
    tried: list[torch.Tensor] = []
    whole = longest_batch.try_longest_batch
    monkeypatch.setattr(longest_batch, "try_longest_batch", lambda *_: 0)
    plain = train(load_recipe(recipe, [f"output={tmp_path / 'plain'}"]))

    def watched(trainer: Any, optimizer: str) -> int:
        collate, random, model = trainer.data_collator, torch.get_rng_state(), trainer.model
        batches = list(trainer.get_train_dataloader())

        def draw(rows: list[Any]) -> dict[str, Any]:
            torch.rand(1)
            tried.append(collate(rows)["input_ids"])
            return collate(rows)

        torch.set_rng_state(random)
        trainer.data_collator = draw
        tokens = whole(trainer, optimizer)
        trainer.data_collator = collate
        assert torch.equal(torch.get_rng_state(), random)
        assert tokens >= max(batch["input_ids"].numel() for batch in batches), "none is longer"
        comes = any(torch.equal(tried[0], batch["input_ids"]) for batch in batches)
        assert comes or objective == "dpo", "KTO's rows stay in order"
        assert (list(model.peft_config), model.active_adapter, trainer.ref_model) == (["default"], "default", None)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert (trainer.nonfinite.micro_batches, dict(trainer._metrics["train"])) == ([], {})
        assert (trainer.run.tokens_seen, trainer.run.own_tokens, trainer._total_train_tokens) == (0, 0, 0)
        return tokens

    monkeypatch.setattr(longest_batch, "try_longest_batch", watched)
    trial = train(load_recipe(recipe, [f"output={tmp_path / 'trial'}"]))
    assert len(tried) == 1
    file = Path("adapter") / "adapter_model.safetensors"
    assert (trial / file).read_bytes() == (plain / file).read_bytes()
    assert _metrics(trial) == _metrics(plain)
    assert all("num_tokens" in line for line in _metrics(plain) if "loss" in line)


def test_running_out_of_memory_is_explained_with_settings_to_try(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(trainer: SftTrainer, optimizer: str) -> int:  # noqa: ARG001
        return torch.empty(1 << 60, dtype=torch.uint8).numel()

    monkeypatch.setattr(longest_batch, "try_longest_batch", no_memory)
    with pytest.raises(UserError, match="ran out of memory") as caught:
        train(load_recipe(recipe_file(train={"micro_batch_size": 8})))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["weights", "adapter", "gradients", "optimizer"]
    assert "rows of 128 tokens" in lines[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_errors_of_memory_become_messages(error: Exception) -> None:
    with pytest.raises(UserError, match="smaller"), explained_out_of_memory(lambda: "smaller"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory(lambda: "smaller"):
        raise RuntimeError("shapes differ")


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics that were written, without speeds and times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "per_s" not in key and "time" not in key} for line in lines]
