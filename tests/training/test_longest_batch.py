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
from lola_ft.training import longest_batch, train
from lola_ft.training.longest_batch import explained_out_of_memory, longest_rows
from lola_ft.training.trainer import LolaTrainer


def test_the_longest_rows_are_found_whatever_their_order() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 9, 1, 7)], "labels": [[1]] * 4})
    assert longest_rows(dataset, 2) == [1, 3]
    assert longest_rows(dataset.select([3, 2, 0]), 2) == [0, 2]
    assert longest_rows(dataset, 9) == [1, 3, 0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_training_is_bit_equal_with_and_without_the_trial(
    packing: bool, recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, int]] = []
    whole = longest_batch.try_longest_batch

    def watched(trainer: LolaTrainer, optimizer: str) -> int:
        longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
        tried.append((whole(trainer, optimizer), longest))
        return tried[-1][0]

    recipe = recipe_file(
        adapter={"dropout": 0.1}, router={"aux_loss": 0.01}, data={"packing": packing}, train={"optimizer": "adamw"}
    )
    plain = train(load_recipe(recipe, [f"output={tmp_path / 'plain'}"]))
    assert tried == [], "not on a CPU"
    monkeypatch.setattr(longest_batch, "is_wanted", lambda _device: True)
    monkeypatch.setattr(longest_batch, "try_longest_batch", watched)
    trial = train(load_recipe(recipe, [f"output={tmp_path / 'trial'}"]))
    [(tokens, longest)] = tried
    assert longest < tokens <= 2 * longest, "two rows, the longest of them among these"
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trial, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert _metrics(trial) == _metrics(plain)


def test_running_out_of_memory_is_explained_with_settings_to_try(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(trainer: LolaTrainer, optimizer: str) -> int:  # noqa: ARG001
        return torch.empty(1 << 60, dtype=torch.uint8).numel()

    monkeypatch.setattr(longest_batch, "is_wanted", lambda _device: True)
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
    """What was written down, but for speeds and times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "per_s" not in key and "time" not in key} for line in lines]
