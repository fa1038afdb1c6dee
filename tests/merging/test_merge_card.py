"""The merged folder is complete: config for both codes, generation config, tokenizer with template, card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from lola_ft.families import LOLA
from lola_ft.merging import merge
from lola_ft.model import LolaConfig
from tests.grids import slow_but

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def in_a_run(adapter: Path, run: Path, quantization: str = "nf4") -> Path:
    """Put the adapter into a run's folder, with the records of a run."""
    run.mkdir()
    adapter.rename(run / "adapter")
    languages = {"sw": {"kept": 1200, "trained_tokens": 5}, "de": {"kept": 30, "trained_tokens": 5}}
    record: dict[str, Any] = {
        "recipe": {"base": {"model": "dice-research/lola_v1", "quantization": quantization}},
        "data": {"train": {"languages": languages}},
    }
    (run / "manifest.json").write_text(json.dumps(record))
    return run / "adapter"


def test_the_card_says_what_was_done(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(tiny_base, in_a_run(adapter, tmp_path / "run"), tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    header = ModelCard(card).data
    assert (header.license, header.language) == ("cc-by-4.0", ["de", "sw"])
    assert (header.library_name, header.base_model) == ("transformers", None)  # a local folder is not named as a base
    assert f"fingerprint `{report.base_fingerprint}`" in card
    assert "58 of 58 adapter tensors found exactly once" in card
    assert "| sw | 1,200 | 5 |\n| de | 30 | 5 |" in card
    assert "same next token at 100.0%" in card
    assert "| merged into | the original weights |" in card
    assert f"| weights | {report.changed} changed, {report.copied} the same as in the base, dtype auto |" in card
    assert str(tmp_path) not in card


def test_an_unchecked_merge_claims_no_check(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(tiny_base, adapter, tmp_path / "merged", check="none")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "checked" not in card
    assert "logits" not in card
    assert ModelCard(card).data.language is None


def test_the_card_names_a_base_of_the_hub(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/lola"}))
    merge(tiny_base, adapter, tmp_path / "merged", check="none")
    card = ModelCard((tmp_path / "merged" / "README.md").read_text())
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("some/lola", "finetune")
    assert card.text.lstrip().startswith("# lola, fine-tuned and merged")
    code = card.text.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("path/to/this/folder", str(tmp_path / "merged")), space := {})
    assert space["model"].config.model_type == "lola_v1"


def test_the_config_names_the_native_class_and_the_code_beside_the_weights(
    copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = copy_base("base", auto_map={"AutoModelForCausalLM": "modeling_lola_gpt2.LOLALMHeadModel"})
    merge(base, adapter, tmp_path / "merged", dtype="bfloat16", check="none")
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert stored["architectures"] == ["LolaForCausalLM"]
    assert stored["auto_map"] == dict(LOLA.auto_map)
    assert stored["torch_dtype"] == "bfloat16"
    assert stored["model_type"] == "lola_v1"
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert type(config) is LolaConfig
    assert str(config.dtype) == "torch.bfloat16"


def test_a_generation_config_is_always_written(copy_base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = copy_base("base")
    (base / "generation_config.json").unlink()
    merge(base, adapter, tmp_path / "merged", check="none")
    config = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (config.bos_token_id, config.eos_token_id) == (0, 5)


@pytest.mark.parametrize("beside", [True, False])
def test_the_chat_template_comes_with_the_tokenizer_of_training(
    beside: bool, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    if beside:
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(adapter)
    merge(tiny_base, adapter, tmp_path / "merged", check="none")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == (TEMPLATE if beside else None)


@pytest.mark.parametrize("quantization", slow_but(["none"], ["nf4", "none"]))
def test_4_bit_is_left_out_if_training_used_none(
    quantization: str, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = merge(tiny_base, in_a_run(adapter, tmp_path / "run", quantization), tmp_path / "merged")
    assert report.effects is not None
    assert (report.effects.adapter_on_4_bit is None) == (quantization == "none")
    assert report.effects.merged_from_original is not None
