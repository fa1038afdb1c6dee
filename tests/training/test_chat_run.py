"""Runs on conversations: the adapter and the merge carry the chat template, and answers stop where a turn ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, pipeline

from lola_ft.data import Template
from lola_ft.data.example import prompt_fields
from lola_ft.generation.prompts import request, template_of
from lola_ft.nano.build import train_tokenizer
from lola_ft.open_model import open_model
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from tests.conftest import make_base
from tests.families.conftest import write_recipe

MARKS = ["<|im_start|>", "<|im_end|>"]
SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is one and one?"}]
ANSWER = "two things"
CHAT_TEMPLATE = """\
{% for message in messages %}{{ "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}{% endfor %}
{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LOLA whose tokenizer has ChatML's marks as tokens and a chat template."""
    folder = make_base(tmp_path_factory.mktemp("chat") / "base")
    tokenizer = train_tokenizer([ANSWER, "Be brief. What is one and one? user system assistant"], 310, 128)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"messages": [*SAID, {"role": "assistant", "content": ANSWER}], "language": "en"}
    file.write_text(f"{json.dumps(row)}\n" * 8, encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chat", "chatml"])
def test_what_was_trained_is_what_a_pipeline_asks_and_the_answer_ends(
    template: str, chat_base: Path, rows: Path, verb: Callable[..., Any], tmp_path: Path
) -> None:
    source = {"path": str(rows), "format": "messages", "language": "en"}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        chat_base,
        rows,
        adapter={"attention": {"rank": 8}, "experts": {"rank": 8}, "dropout": 0.0},
        data={"template": template, "sources": [source], "max_length": 100, "packing": False, "validation": 0.0},
        train={"max_steps": 30, "micro_batch_size": 4, "learning_rate": 0.02, "warmup_ratio": 0.0},
    )
    run = train(load_recipe(recipe))
    assert (run / "adapter" / "prompt_template.jinja").is_file() == (template == "chatml")
    opened = open_model(run)
    assert opened.template is not None
    assert opened.template.source == (CHAT_TEMPLATE if template == "chat" else Template.load("chatml").source)
    assert verb("generate", run, "--file", prompts(tmp_path), "--out", tmp_path / "said.jsonl").code == 0
    assert json.loads((tmp_path / "said.jsonl").read_text())["answer"] == ANSWER
    assert verb("merge", run, "--out", tmp_path / "merged").code == 0
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert stops == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    chat = pipeline("text-generation", str(tmp_path / "merged"), device="cpu", max_new_tokens=20, do_sample=False)
    assert chat(SAID)[0]["generated_text"][-1] == {"role": "assistant", "content": ANSWER}


def test_a_base_is_asked_by_its_tokenizers_chat_template(chat_base: Path, verb: Callable[..., Any]) -> None:
    outcome = verb("generate", chat_base, "--prompt", "What is one?", "--max-new-tokens", "4")
    assert "prompts are written with its tokenizer's chat template" in outcome.err
    opened = open_model(chat_base)
    template = template_of(opened, None)
    ids = template.prompt_ids(request(prompt_fields("What is one?")), opened.tokenizer)
    asked = [{"role": "user", "content": "What is one?"}]
    assert ids == opened.tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def prompts(folder: Path) -> Path:
    file = folder / "asked.jsonl"
    file.write_text(json.dumps({"messages": SAID}) + "\n", encoding="utf-8")
    return file
