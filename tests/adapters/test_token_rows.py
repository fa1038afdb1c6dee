"""Trained rows of special tokens: computed without a copy of the embeddings, stored in PEFT's form, merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.errors import AdapterError, CheckpointError, UserError
from lola_ft.families import architecture_of
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from tests.families.conftest import write_recipe
from tests.families.moe import make_moe
from tests.grids import slow_but

IDS = (310, 317)
LABELS = torch.tensor([[3, 310, 8, 9, 317, 2], [310, 310, 4, 5, 6, 317]])


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a tied output head (LOLA), and one with an untied head (OLMoE)."""
    return {"lola": tiny_base, "olmoe": make_moe(tmp_path_factory.mktemp("rows") / "olmoe", "olmoe")}


def with_rows(base: Path, quantization: str | None = None) -> Any:
    """An adapter with trained rows that differ from the base's."""
    torch.manual_seed(0)
    model = add_adapter(
        lola_ft.load_base(base, quantization, dtype="float32", quiet=True),
        AdapterSettings(attention_rank=2, expert_rank=2, token_ids=IDS),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def by_peft(model: Any) -> None:
    """Make the layers compute as in PEFT."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = TrainableTokensLayer


def gradients(model: Any, skip_logits: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(LABELS, labels=LABELS, skip_logits=skip_logits)
    loss = out.loss
    if not skip_logits:
        logits = out.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, LABELS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["lola", "olmoe"])
def test_loss_and_gradients_are_those_of_pefts_own_layer(bases: dict[str, Path], family: str) -> None:
    model = with_rows(bases[family])
    ours, ours_by_name = gradients(model, skip_logits=True)
    logits = model(LABELS).logits.detach()
    by_peft(model)
    stock, stock_by_name = gradients(model, skip_logits=False)
    torch.testing.assert_close(logits, model(LABELS).logits)
    torch.testing.assert_close(ours, stock)
    rows = [name for name in ours_by_name if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if family == "lola" else 2)
    for name, gradient in ours_by_name.items():
        # Sums over the vocabulary in another order: a few float32 roundings of gradients around 1.
        torch.testing.assert_close(gradient, stock_by_name[name], atol=1e-5, rtol=1e-5, msg=name)
    assert all(ours_by_name[name].ne(0).any() for name in rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lola", "olmoe"])
def test_a_stored_adapter_gives_the_same_logits_here_in_stock_peft_and_merged(
    bases: dict[str, Path], family: str, tmp_path: Path
) -> None:
    model = with_rows(bases[family])
    expected = model(LABELS).logits.detach()
    lola_ft.save_adapter(model, tmp_path / "adapter")
    loaded = lola_ft.load_adapter(
        lola_ft.load_base(bases[family], None, dtype="float32", quiet=True), tmp_path / "adapter"
    )
    assert torch.equal(loaded(LABELS).logits, expected)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32), tmp_path / "adapter"
    )
    torch.testing.assert_close(stock(LABELS).logits, expected, atol=1e-5, rtol=1e-5)
    report = lola_ft.merge(bases[family], tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(LABELS).logits, expected, atol=1e-4, rtol=1e-4)
    assert report.weights is not None
    assert report.weights.without_update == []
    assert report.applied == report.adapter_tensors
    name = architecture_of(merged.config).family.embeddings[0]
    before, after = (
        {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}[name]
        for folder in (bases[family], tmp_path / "merged")
    )
    changed = [row for row in range(len(before)) if not torch.equal(before[row], after[row])]
    assert changed == list(IDS)


def test_the_layout_per_expert_refuses_token_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="special tokens, which the layout per_expert cannot hold"):
        lola_ft.save_adapter(with_rows(bases["lola"]), tmp_path / "adapter", layout="per_expert")


def test_rows_of_tokens_that_the_base_lacks_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    lola_ft.save_adapter(with_rows(bases["lola"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["trainable_token_indices"] = {"wte": [310, 321]}
    file.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"transformer.wte.weight: .* for the tokens \[310, 321\]"):
        lola_ft.load_adapter(lola_ft.load_base(bases["lola"], None, quiet=True), tmp_path / "adapter")


def chat_recipe(base: Path, folder: Path, tokens: list[str]) -> Path:
    rows = folder / "rows.jsonl"
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    rows.write_text(f"{json.dumps({'messages': turns})}\n" * 8, encoding="utf-8")
    source = {"path": str(rows), "format": "messages", "language": "en"}
    data = {"template": "chatml", "sources": [source], "special_tokens": tokens, "validation": 0.0}
    adapter = {} if "lola" in (base / "config.json").read_text() else {"mlp": None}
    return write_recipe(
        folder / "recipe.yaml", base, rows, adapter=adapter, data=data, train={"max_steps": 4, "save_every": 2}
    )


def roomy(folder: Path) -> Path:
    """A tiny LOLA whose last rows belong to no token."""
    from lola_ft.nano.build import train_tokenizer
    from tests.conftest import make_base

    make_base(folder)
    train_tokenizer(["one two three user assistant"], 300, 128).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_trains_the_rows_of_its_special_tokens_and_no_others(verb: Callable[..., Any], tmp_path: Path) -> None:
    base = roomy(tmp_path / "base")
    recipe = chat_recipe(base, tmp_path, ["<|im_start|>", "<|im_end|>"])
    planned = json.loads(verb("plan", recipe, "--json").out)
    run = train(load_recipe(recipe))
    file = run / "adapter" / "adapter_model.safetensors"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["trained"]["special tokens"] == {"tensors": 1, "parameters": 2 * 64}
    assert planned["trained_parameters"] == sum(count["parameters"] for count in manifest["trained"].values())
    assert planned["adapter_file_bytes"] == file.stat().st_size
    rows = load_file(file)["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"]
    before = load_file(base / "model.safetensors")["transformer.wte.weight"]
    ids = json.loads((run / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]["wte"]
    assert not torch.equal(rows, before[ids])
    assert verb("merge", run, "--out", tmp_path / "merged").code == 0
    after = load_file(tmp_path / "merged" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(after[ids], rows.to(after.dtype))
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"][0] == ids[1]


@pytest.mark.parametrize("family", slow_but([], ["lola", "olmoe"]))
def test_tokens_beyond_the_embeddings_get_rows_that_training_merging_and_loading_know(
    bases: dict[str, Path], family: str, verb: Callable[..., Any], tmp_path: Path
) -> None:
    rows = architecture_of(AutoModelForCausalLM.from_pretrained(bases[family]).config).sizes.vocab
    free = rows - len(AutoTokenizer.from_pretrained(bases[family]))
    names = [f"<|new {place}|>" for place in range(free)] + ["<|im_start|>", "<|im_end|>"]
    recipe = chat_recipe(bases[family], tmp_path, names)
    planned = json.loads(verb("plan", recipe, "--json").out)
    outcome = verb("train", recipe)
    assert outcome.code == 0, outcome.err
    assert f"The embeddings grow from {rows} to {rows + 2} rows" in outcome.out
    run = tmp_path / "run"
    assert verb("merge", run, "--out", tmp_path / "merged").code == 0
    written = {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert planned["merged_file_bytes"] == written
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == rows + 2
    base = lola_ft.load_base(bases[family], None, dtype="float32", quiet=True)
    ours = lola_ft.load_adapter(base, run / "adapter")
    labels = torch.tensor([[3, rows, 8, rows + 1]])
    torch.testing.assert_close(merged(labels).logits, ours(labels).logits, atol=1e-4, rtol=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    stock.resize_token_embeddings(rows + 2)
    stock = PeftModel.from_pretrained(stock, run / "adapter")
    torch.testing.assert_close(stock(labels).logits, ours(labels).logits, atol=1e-5, rtol=1e-5)
    assert verb("generate", run, "--prompt", "one", "--max-new-tokens", "2").code == 0
    assert f"model.resize_token_embeddings(max({rows + 2}, model.config.vocab_size))" in (run / "README.md").read_text()


@pytest.mark.slow
def test_tokens_without_rows_in_the_base_are_named_with_the_fix(tmp_path: Path, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<|{place}|>" for place in range(321 - len(tokenizer))], special_tokens=True)
    tokenizer.save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"embeddings for only 320; <\|\d+\|> has none.*data.special_tokens"):
        train(load_recipe(chat_recipe(base, tmp_path, [])), dry_run=True)
    assert train(load_recipe(chat_recipe(base, tmp_path, [tokenizer.convert_ids_to_tokens(320)])))


def test_an_ordinary_token_is_refused_as_a_special_one(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"data.special_tokens: 'e' is already an ordinary token"):
        train(load_recipe(chat_recipe(tiny_base, tmp_path, ["e"])), dry_run=True)
