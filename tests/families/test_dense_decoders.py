"""Llama-like dense decoders, for comparison: loaded, adapted, packed and merged. The reference is stock libraries."""

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter, save_adapter
from lola_ft.families import architecture_of
from lola_ft.nano.build import train_tokenizer
from lola_ft.planning.saved_for_backward import activations
from lola_ft.quantization import NF4Linear, load_base
from lola_ft.quantization.nf4 import quantize
from tests.families.moe import COMMON, TEXT
from tests.grids import slow_but
from tests.planning.conftest import Batch, adapted, job_of, saved_bytes

__all__ = ["saved_bytes"]

IDS = torch.randint(6, 320, (2, 13), generator=torch.Generator().manual_seed(1))
FILE = "model.safetensors"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 96, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"intermediate_size": 96, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"intermediate_size": 96, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"intermediate_size": 96, "head_dim": 32}),
}


@pytest.fixture(scope="module", params=slow_but(["qwen3"], KINDS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    name, sizes = KINDS[request.param]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**COMMON | sizes))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model.save_pretrained(folder)
    train_tokenizer(TEXT, vocab_size=320, max_length=128).save_pretrained(folder)
    return folder


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


def test_every_tensor_has_a_place_and_logits_and_gradients_are_those_of_stock_transformers(base: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours = load_base(base, None, "float32", "cpu", quiet=True)
    assert load_file(base / FILE).keys() == architecture_of(ours.config).places.keys()
    torch.testing.assert_close(logits(ours), logits(stock))
    for model in (stock, ours):
        model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_angles_in_old_checkpoints_are_left_out(base: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(base, tmp_path / "old"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(base / FILE) | {name: torch.ones(8)}, old / FILE, metadata={"format": "pt"})
    found, expected = (logits(load_base(folder, None, "float32", "cpu", quiet=True)) for folder in (old, base))
    assert torch.equal(found, expected)


def test_4_bit_layers_hold_the_stored_weights(base: Path) -> None:
    model = load_base(base, "nf4", "float32", "cpu", quiet=True)
    tensors, places = load_file(base / FILE), architecture_of(model.config).places
    for name, place in places.items():
        module = model.get_submodule(place.module)
        if place.quantized:
            assert isinstance(module, NF4Linear)
            assert torch.equal(module.stored().packed, quantize(tensors[name]).packed), name
    assert (logits(model) - logits(load_base(base, None, "float32", "cpu", quiet=True))).abs().max() < 1.5


def test_packed_documents_do_not_see_each_other(base: Path) -> None:
    model = load_base(base, "nf4", "float32", "cpu", quiet=True)
    first, second = IDS[:1], IDS[1:, :9]
    packed, positions = torch.cat([first, second], 1), torch.tensor([[*range(13), *range(9)]])
    with torch.no_grad():
        together = model.model(packed, position_ids=positions, use_cache=False).last_hidden_state[:, 13:]
        alone = model.model(second, use_cache=False).last_hidden_state
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_stock_peft_computes_and_merges_the_same(base: Path, tmp_path: Path) -> None:
    settings = AdapterSettings(attention_rank=3, mlp_rank=4, alpha=8.0, tune_norms=True)
    ours = add_adapter(load_base(base, None, "float32", "cpu", quiet=True), settings)
    torch.manual_seed(4)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_adapter(ours, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-5, rtol=1e-4)
    report = lola_ft.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.applied == report.adapter_tensors == report.weights.applied_once
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(stock), atol=1e-5, rtol=1e-4)
    assert load_file(tmp_path / "merged" / FILE).keys() == load_file(base / FILE).keys()


@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "float32"), (None, "bfloat16")])
def test_saved_tensors_are_as_planned(base: Path, quantization: str | None, dtype: str, saved_bytes: Any) -> None:
    settings, batch = AdapterSettings(attention_rank=4, mlp_rank=4), Batch(6, 64)
    model = adapted(base, quantization, dtype, settings)
    planned = activations(job_of(model.config, settings, quantization, dtype, batch)).saved
    assert planned == pytest.approx(saved_bytes(model, batch, dtype == "bfloat16"), rel=0.05)  # rows of the mask
