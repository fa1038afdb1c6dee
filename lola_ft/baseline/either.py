"""LOLA or a dense baseline: the functions of `adapters`, `model` and `quantization` that a run calls, for both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lola_ft import adapters, quantization
from lola_ft.adapters import AdapterSettings
from lola_ft.baseline.adapter import add_dense_adapter, load_dense_adapter, save_dense_adapter
from lola_ft.baseline.checkpoint import read_dense_config
from lola_ft.baseline.families import FAMILIES, Family, family_in, family_of
from lola_ft.baseline.load import load_dense
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.model.tokenizer import read_config as read_lola_config


def open_checkpoint(path: str | Path, revision: str | None = None) -> BaseCheckpoint | BaseCheckpoint:
    """A base's checkpoint, checked."""
    return BaseCheckpoint.open(path, revision) if family_of(path, revision) else BaseCheckpoint.open(path, revision)


def read_config(folder: Path) -> Any:
    """A base's config."""
    return read_dense_config(folder) if family_in(folder) else read_lola_config(folder)


def load_base(
    path: str | Path,
    quantized: str | None = "nf4",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    revision: str | None = None,
    quiet: bool = False,
) -> Any:
    """As `lola_ft.load_base`, of a dense model too."""
    load = load_dense if family_of(path, revision) else quantization.load_base
    return load(path, quantized, dtype, device, revision, quiet)


def add_adapter(model: Any, settings: AdapterSettings) -> PeftModel:
    """A fresh adapter on a base; all else is frozen."""
    return (add_dense_adapter if family_in_memory(model) else adapters.add_adapter)(model, settings)


def save_adapter(
    model: PeftModel, path: str | Path, layout: str = "peft", also: Callable[[Path], None] | None = None
) -> Path:
    """As `lola_ft.save_adapter`; a dense model's adapter has one layout alone."""
    if family_in_memory(model):
        return save_dense_adapter(model, path, also)
    return adapters.save_adapter(model, path, layout, also)


def load_adapter(model: Any, path: str | Path) -> PeftModel:
    """As `lola_ft.load_adapter`."""
    return load_dense_adapter(model, path) if family_in_memory(model) else adapters.load_adapter(model, path)


def family_in_memory(model: Any) -> Family | None:
    """The family of a model or of what its adapter is on; None of LOLA."""
    return FAMILIES.get(model.config.model_type)
