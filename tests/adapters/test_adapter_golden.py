"""The authors' adapter, loaded and stored by lola_ft, has the outputs, gradients and weights of their own code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from lola_ft.adapters import load_adapter, save_adapter
from lola_ft.adapters.layouts import from_state
from lola_ft.families import architecture_of
from lola_ft.quantization import load_base

# Float32 sums have another order. This is the limit that an adapter must meet.
PARITY = 1e-5


def run(model: Any, golden: dict[str, Tensor]) -> Any:
    return model(
        golden["input_ids"],
        attention_mask=golden["attention_mask"],
        labels=golden["labels"],
        output_router_logits=True,
    )


@pytest.fixture(scope="module")
def stored(golden_base: Path, golden_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden adapter as its authors stored it, and as lola_ft stores it in both layouts."""
    folder = tmp_path_factory.mktemp("golden")
    model = load_adapter(load_base(golden_base, quantization=None, dtype="float32", quiet=True), golden_adapter)
    for layout in ("peft", "per_expert"):
        save_adapter(model, folder / layout, layout)
    return {"authors": golden_adapter, "peft": folder / "peft", "per_expert": folder / "per_expert"}


@pytest.mark.parametrize("layout", ["authors", "peft", "per_expert"])
def test_outputs_and_gradients_are_those_of_the_authors_code(
    layout: str, stored: dict[str, Path], golden: dict[str, Tensor], golden_base: Path
) -> None:
    base = load_base(golden_base, quantization=None, dtype="float32", quiet=True)
    model = load_adapter(base, stored[layout], trainable=True).eval()
    output = run(model, golden)
    assert (output.logits - golden["lora.logits"]).abs().max() < PARITY
    assert_close(output.loss, golden["lora.loss"][0], atol=PARITY, rtol=0)
    assert_close(output.aux_loss, golden["lora.aux_loss_real_tokens"][0], atol=PARITY, rtol=0)
    for actual, expected in zip(output.router_logits, golden["lora.router_logits"], strict=True):
        assert (actual - expected).abs().max() < PARITY
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))

    output.loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name.replace(".default", ""): parameter.grad for name, parameter in trained.items()}
    grads = from_state(state, model.peft_config["default"].to_dict(), architecture_of(model.config))
    assert len(grads.pairs) == 28
    compared = 0
    for module, pair in grads.pairs.items():
        for factor, grad in (("A", pair.a), ("B", pair.b)):
            expected_grad = golden.get(f"lora.grad.base_model.model.{module}.lora_{factor}.default.weight")
            if expected_grad is None:  # their code does not run an expert without tokens
                assert ".experts." in module
                assert not grad.any()
            else:
                assert_close(grad, expected_grad, atol=PARITY, rtol=1e-5)
                compared += 1
    assert compared == sum(name.startswith("lora.grad.") for name in golden) == 48


def test_the_per_expert_layout_is_the_authors_file(stored: dict[str, Path], golden_adapter: Path) -> None:
    ours = load_file(stored["per_expert"] / "adapter_model.safetensors")
    theirs = load_file(golden_adapter / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


def test_the_per_expert_config_has_only_keys_of_the_authors_peft(stored: dict[str, Path], golden_adapter: Path) -> None:
    """PEFT 0.11 refuses a config with unknown keys. The golden config has every key that it knows."""
    ours = json.loads((stored["per_expert"] / "adapter_config.json").read_text())
    theirs = json.loads((golden_adapter / "adapter_config.json").read_text())
    assert ours.keys() <= theirs.keys()
    same = ("peft_type", "task_type", "r", "lora_alpha", "fan_in_fan_out", "use_rslora", "bias", "modules_to_save")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    keys = load_file(golden_adapter / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}
    hit = {module for module in modules for target in ours["target_modules"] if module.endswith(f".{target}")}
    assert hit == modules
