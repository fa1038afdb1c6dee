"""The model card: what the Hub reads in its header, what people read below."""

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lola_ft.card import CardFacts, render_card
from lola_ft.families import GPT2, LOLA

MANIFEST: dict[str, Any] = {
    "recipe": {
        "base": {"model": "models/lola", "quantization": "nf4", "dtype": "bfloat16"},
        "adapter": {"attention": {"rank": 16}, "mlp": None, "experts": {"rank": 8}, "alpha": 32.0, "biases": True},
        "router": {"mode": "tuned"},
        "train": {"learning_rate": 1e-4, "scheduler": "cosine"},
        "data": {"sources": [{"hub": "some/dataset"}, {"path": "/home/amina/sw.jsonl", "hub": None}]},
    },
    "base": {"fingerprint": "0123456789abcdef", "dtype": "bfloat16"},
    "trained": {"attention": {"parameters": 1000}, "experts": {"parameters": 2345}},
    "data": {
        "train": {
            "languages": {
                code: {"kept": 1200, "trained_tokens": 34567} for code in ("sw", "zh_TW", "und", "deu", "x-klingon")
            }
        }
    },
    "results": {"steps": 7, "mean_loss": 1.5, "eval_loss": 1.25, "eval_loss_by_language": {"sw": 1.0, "deu": 1.5}},
    "routing": {"drift": {"sw": 0.125}},
    "energy": {"kwh": 2.5, "source": "GPU counter"},
}
REPORT = {"base_fingerprint": "fedcba9876543210", "applied": 40, "adapter_tensors": 40, "rounding": "base"}


def facts(**changes: Any) -> CardFacts:
    """A published adapter; keywords change it."""
    settings: dict[str, Any] = {
        "title": "lola-sw",
        "kind": "adapter",
        "location": "user/lola-sw",
        "published": True,
        "base": "dice-research/lola_v1",
        "family": LOLA,
        "base_revision": "main",
        "layout": "peft",
        "stock_peft": True,
        "manifest": MANIFEST,
        "files": ("adapter_config.json", "tokenizer.json"),
    }
    return CardFacts(**settings | changes)


def test_the_header_of_an_adapter_names_base_licence_languages_and_tags() -> None:
    assert ModelCard(render_card(facts())).data.to_dict() == {
        "base_model": "dice-research/lola_v1",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "cc-by-4.0",
        "language": ["deu", "sw", "zh"],  # codes that the Hub knows: no region, no `und`, nothing private
        "datasets": ["some/dataset"],
        "pipeline_tag": "text-generation",
        "tags": ["lola", "lola_ft", "mixture-of-experts", "multilingual", "lora"],
    }


def test_the_header_of_merged_weights_calls_them_a_finetune() -> None:
    card = ModelCard(render_card(facts(kind="merged", layout=None, merge_report=REPORT)))
    assert card.data.library_name == "transformers"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "40 of 40 adapter tensors" in card.text


def test_without_a_manifest_a_card_leaves_out_data_and_results() -> None:
    card = ModelCard(render_card(facts(manifest={})))
    assert card.data.base_model == "dice-research/lola_v1"
    assert card.data.language is None
    assert "## Data" not in card.text
    assert "## Results" not in card.text
    assert "## How to load it" in card.text


@pytest.mark.parametrize(
    "line",
    [
        "| base | dice-research/lola_v1, revision `main` (fingerprint `0123456789abcdef`) |",
        "| layout | `peft` |",
        "| trained on | 4-bit (NF4) base, bfloat16 |",
        "| LoRA | attention rank 16, experts rank 8, alpha 32 |",
        "| fully trained | biases |",
        "| router | tuned |",
        "| learning rate | 0.0001, cosine |",
        "| trained parameters | 3,345 |",
        "| sw | 1,200 | 34,567 |",
        "From [some/dataset](https://huggingface.co/datasets/some/dataset) and 1 local file.",
        "| optimiser steps | 7 |",
        "| validation loss | 1.2500 |",
        "| language | eval_loss_by_language |",
        "| deu | 1.5000 |",
        "## Routing",
        "| drift / sw | 0.1250 |",
        "## Energy",
        "| kwh | 2.5000 |",
        "under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). This model adds low-rank updates to",
    ],
)
def test_the_text_states_settings_data_and_results(line: str) -> None:
    assert line in render_card(facts())


def test_a_card_names_no_local_file() -> None:
    assert "/home" not in render_card(facts())


def test_a_draft_claims_no_place_on_the_hub() -> None:
    card = ModelCard(render_card(facts(published=False, base="/models/lola", base_revision=None, location="adapter")))
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert "snapshot_download" not in card.text
    assert 'lola_ft.load_adapter(model, "adapter")' in card.text


def test_a_pinned_base_is_loaded_as_pinned() -> None:
    assert 'load_base("dice-research/lola_v1", revision="abc", quantization="nf4")' in render_card(
        facts(base_revision="abc")
    )


def test_a_card_of_another_family_claims_nothing_of_lola() -> None:
    card = ModelCard(render_card(facts(base="some/gpt2", family=GPT2)))
    assert "license" not in card.data.to_dict()
    assert card.data.tags == ["lola_ft", "lora"]
    assert "CC BY" not in card.text
    assert "The licence of the base applies" in card.text
    assert "what LOLA is" not in card.text


def many(count: int) -> dict[str, Any]:
    """The manifest of a run in `count` languages, of which language n has 10 * n trained tokens and loss n / 100."""
    codes = [f"l{number:03}" for number in range(1, count + 1)]
    languages = {code: {"kept": 5, "trained_tokens": 10 * int(code[1:])} for code in codes}
    losses = {code: int(code[1:]) / 100 for code in codes}
    figures = {"drift": dict.fromkeys(codes, 0.5)}
    return MANIFEST | {
        "data": {"train": {"languages": languages}},
        "results": {"steps": 7, "eval_loss_by_language": losses},
        "routing": figures,
    }


def test_long_tables_show_the_extremes_and_fold_the_whole() -> None:
    text = render_card(facts(manifest=many(144)))
    data = text.partition("## Data")[2].partition("## Results")[0]
    largest, smallest, whole = re.split("Smallest 10|<details>", data)
    assert "Largest 10 by trained tokens" in largest
    assert re.findall(r"^\| (l\d+)", largest, re.MULTILINE) == [f"l{n:03}" for n in range(144, 134, -1)]
    assert re.findall(r"^\| (l\d+)", smallest, re.MULTILINE) == [f"l{n:03}" for n in range(10, 0, -1)]
    assert len(re.findall(r"^\| l\d+", whole, re.MULTILINE)) == 144
    assert "<summary>All 144 languages</summary>\n\n| language" in whole, "Markdown inside needs an empty line"
    results = text.partition("## Results")[2].partition("## Routing")[0]
    assert "Largest 10 by eval_loss_by_language" in results
    assert results.count("| l144 | 1.4400 |") == 2
    assert "<summary>144 figures</summary>" in text
    assert text.count("<details>") == text.count("</details>") == 3


@pytest.mark.parametrize(("count", "folds"), [(30, 0), (31, 3)])
def test_a_table_is_folded_from_31_rows(count: int, folds: int) -> None:
    assert render_card(facts(manifest=many(count))).count("<details>") == folds


def test_a_language_without_a_number_is_in_the_folded_table_only() -> None:
    manifest = many(31)
    manifest["results"] = {"eval_loss": {"l001": 1.0}, "accuracy": {f"l{n:03}": 0.5 for n in range(1, 32)}}
    results = render_card(facts(manifest=manifest)).partition("## Results")[2].partition("## Routing")[0]
    assert results.count("| l001 | 1.0000 | 0.5000 |") == 2
    assert results.count("| l002 |") == 1
    assert "Smallest" not in results
