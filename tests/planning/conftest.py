"""A base whose sizes are no multiples of one another, adapted models, and what autograd saves of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.planning import Job
from lola_ft.quantization import load_base
from tests.conftest import make_base


@pytest.fixture(scope="session")
def odd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with an inner size of its own; read only."""
    return make_base(tmp_path_factory.mktemp("odd") / "base", n_inner=192)


@dataclass(frozen=True)
class Batch:
    """How a micro batch is made."""

    rows: int = 2
    length: int = 64
    packing: bool = True
    checkpointing: bool = False


def adapted(base: Path, quantization: str | None, dtype: str, settings: AdapterSettings, dropout: float = 0.0) -> Any:
    """A model in training with a fresh adapter; `dropout` is the base's own, wherever it has some."""
    model: Any = load_base(base, quantization, dtype, "cpu", quiet=True)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, dropout)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return add_adapter(model, settings).train()


def make_batch(batch: Batch) -> dict[str, torch.Tensor]:
    """Random tokens, all of them learned; packed, or the last row padded."""
    ids = torch.randint(5, 300, (batch.rows, batch.length), generator=torch.Generator().manual_seed(0))
    if batch.packing:
        positions = torch.arange(batch.length).repeat(batch.rows)[None]
        return {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1).clone(), "position_ids": positions}
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0 if batch.rows > 1 else 1
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


@pytest.fixture
def saved_bytes() -> Callable[[Any, Batch, bool], int]:
    """Bytes of all storages that autograd saves in a forward pass, parameters and buffers left out."""

    def measure(model: Any, batch: Batch, half: bool) -> int:
        if batch.checkpointing:  # as the trainer does it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            outputs = model(**make_batch(batch), use_cache=False, skip_logits=True)
        assert outputs.loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    return measure


def job_of(config: Any, settings: AdapterSettings, quantization: str | None, dtype: str, batch: Batch) -> Job:
    """What the planner is told of a batch, on a CPU."""
    return Job(
        config,
        settings,
        quantization,
        dtype,
        "cpu",
        micro_batch_size=batch.rows,
        length=batch.length,
        packing=batch.packing,
        checkpointing=batch.checkpointing,
    )
