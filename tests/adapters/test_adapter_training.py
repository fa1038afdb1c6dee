"""Training of a stored adapter from Python: a trainable one learns, a frozen one is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter, save_adapter
from lola_ft.errors import AdapterError
from lola_ft.model import LolaForCausalLM
from lola_ft.quantization import load_base
from tests.families.moe import make_moe


def train(model: PeftModel, base: Path, folder: Path, **settings: Any) -> None:
    """Train two steps with TRL's own trainer, as a user would."""
    rows = Dataset.from_list([{"text": f"one two {word}"} for word in ("three", "four", "five", "six")])
    arguments: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.01, "report_to": "none", "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "max_length": 32} | settings
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **arguments),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()


def lora_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters() if ".lora_B." in name}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainable_adapter_learns_with_trl(
    checkpointing: bool, fresh: Callable[..., LolaForCausalLM], tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    model = lola_ft.load_adapter(fresh("nf4"), tiny_adapter, trainable=True)
    before = lora_of(model)
    train(model, tiny_base, tmp_path, gradient_checkpointing=checkpointing)
    assert any(not torch.equal(x, before[name]) for name, x in lora_of(model).items() if ".experts." in name)
    assert any(not torch.equal(x, before[name]) for name, x in lora_of(model).items() if ".attn." in name)
    lola_ft.save_adapter(model, tmp_path / "longer")
    again = lola_ft.load_adapter(fresh("nf4"), tmp_path / "longer")
    assert all(torch.equal(x, lora_of(model)[name]) for name, x in lora_of(again).items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_a_frozen_adapter_is_an_error(
    checkpointing: bool, fresh: Callable[..., LolaForCausalLM], tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """The error replaces a loss that never falls. With checkpointing the graph has gradients, but none of a weight."""
    model = lola_ft.load_adapter(fresh("nf4"), tiny_adapter)
    with pytest.raises(AdapterError, match=r"loaded frozen.*trainable=True"):
        train(model, tiny_base, tmp_path, gradient_checkpointing=checkpointing)


@pytest.mark.slow
def test_another_family_trains_only_a_trainable_adapter(tmp_path: Path) -> None:
    base = make_moe(tmp_path / "olmoe", "olmoe")
    settings = AdapterSettings(attention_rank=2, expert_rank=4)
    save_adapter(add_adapter(load_base(base, None, "float32", "cpu", quiet=True), settings), tmp_path / "adapter")
    model = lola_ft.load_adapter(load_base(base, None, "float32", "cpu", quiet=True), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="loaded frozen"):
        train(model, base, tmp_path / "run")
    model = lola_ft.load_adapter(
        load_base(base, None, "float32", "cpu", quiet=True), tmp_path / "adapter", trainable=True
    )
    train(model, base, tmp_path / "run")
    assert any(x.ne(0).any() for name, x in lora_of(model).items() if ".experts." in name)


def test_a_frozen_adapter_runs_where_nothing_has_to_train(
    fresh: Callable[..., LolaForCausalLM], tiny_adapter: Path, ids: Tensor
) -> None:
    """The adapter runs in evaluation mode, in training mode without gradients, and if another adapter is trained."""
    model = lola_ft.load_adapter(fresh(), tiny_adapter)
    expected = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, expected)
    with pytest.raises(AdapterError, match="loaded frozen"):
        model(ids)
    model = lola_ft.load_adapter(model, tiny_adapter, trainable=True, name="second")
    assert model(ids).logits.requires_grad
