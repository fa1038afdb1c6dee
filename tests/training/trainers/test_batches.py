"""Batches that the trainer feeds the model have answers and their EOS as labels, never prompts or padding."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lola_ft.data import encode_texts
from lola_ft.model import LolaForCausalLM
from lola_ft.recipe import load_recipe
from lola_ft.recipe.schema import Recipe
from lola_ft.training.dataset import RunData, prepare
from lola_ft.training.packing import ready
from lola_ft.training.precision import choose_precision
from lola_ft.training.trainers.arguments import training_arguments
from lola_ft.training.trainers.sft import SftTrainer

EOS = 5
TURNS = ["Moja?", "One.", "Mbili?", "Two.", "Tatu?", "Three."]


def chat(turns: list[str], language: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return {"messages": messages, "language": language}


@pytest.fixture
def chats(tmp_path: Path) -> dict[str, Any]:
    """Nine conversations of one to three answers."""
    rows = [chat(TURNS[: 2 * (1 + place % 3)], ("sw", "en")[place % 2]) for place in range(9)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "messages", "language_column": "language"}
    return {"template": "plain", "sources": [source], "max_length": 64, "packing": False}


def feed(recipe: Recipe, base: Path, tokenizer: Any, folder: Path) -> tuple[RunData, list[dict[str, Any]]]:
    """The data and every batch of an epoch."""
    data = prepare(recipe.data, tokenizer, seed=0)
    device = torch.device("cpu")
    precision = choose_precision("float32", device)
    arguments = training_arguments(recipe, folder, precision, device, steps=1, evaluate=False)
    model = LolaForCausalLM.from_pretrained(base)
    rows = ready(data.mix.dataset, recipe.data.packing, recipe.data.max_length)
    trainer = SftTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return data, list(trainer.get_train_dataloader())


def learned_runs(labels: list[int]) -> list[list[int]]:
    """Runs of labels that are learned, cut after each EOS."""
    runs, run = list[list[int]](), list[int]()
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        if run and label in (-100, EOS):
            runs.append(run)
            run = []
    return runs


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "<|endoftext|>"])
def test_every_answer_ends_with_a_learned_eos_and_padding_is_masked_by_position(
    recipe_file: Callable[..., Path], chats: dict[str, Any], tiny_base: Path, tmp_path: Path, packing: bool, pad: str
) -> None:
    (tmp_path / "chat.jinja").write_text("{% if not first %}\n{% endif %}{{ messages[-1].content }}=")
    changes = chats | {"template": str(tmp_path / "chat.jinja"), "packing": packing}
    recipe = load_recipe(recipe_file(data=changes, train={"micro_batch_size": 3, "max_steps": 9}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, pad_token=pad)
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (pad == "<|endoftext|>")
    data, batches = feed(recipe, tiny_base, tokenizer, tmp_path / "x")
    answers = {(*ids, EOS) for ids in encode_texts(["One.", "Two.", "Three."], tokenizer)}
    runs = [tuple(run) for batch in batches for row in batch["labels"].tolist() for run in learned_runs(row)]
    assert len(runs) == 18  # three times one, two and three answers
    assert set(runs) == answers
    assert sum(map(len, runs)) == data.train.report.total.trained_tokens
    for batch in batches:
        kept = batch["labels"] != -100
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
        if not packing:
            mask = batch["attention_mask"].bool()
            assert not kept[~mask].any()
            assert (batch["input_ids"][~mask] == tokenizer.pad_token_id).all()
    if not packing:
        assert any((~batch["attention_mask"].bool()).any() for batch in batches)


def test_a_conversation_of_several_turns_needs_a_template_that_renders_them(
    recipe_file: Callable[..., Path], chats: dict[str, Any], verb: Callable[..., Any]
) -> None:
    outcome = verb("train", recipe_file(data=chats))
    assert outcome.code == 2
    assert "chats.jsonl:2: a conversation with 2 answers, and template plain renders a single request" in outcome.err
