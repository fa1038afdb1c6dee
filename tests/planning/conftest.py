"""Bases of every family with sizes that are no multiples of one another, adapted models, and what autograd saves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_ft import load_base
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.families import Architecture, architecture_of
from lola_ft.planning import Job
from tests.conftest import make_base
from tests.families.conftest import make_dense

FAMILIES = ("lola", "gpt2", "bloom")
# BLOOM has no choice of the inner size.
ODD: dict[str, dict[str, Any]] = {
    "lola": {"n_inner": 192},
    "gpt2": {"n_embd": 40, "n_layer": 3, "n_inner": 200},
    "bloom": {"hidden_size": 40, "n_layer": 3},
}
DROPOUTS: dict[str, dict[str, Any]] = {
    "lola": {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}


def make(folder: Path, family: str, **changes: Any) -> Path:
    """Write a tiny random base of a family, with its tokenizer."""
    return make_base(folder, **changes) if family == "lola" else make_dense(folder, family, **changes)


@pytest.fixture(scope="session")
def odd_bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Gives a family's base; with the base's own dropout wherever the family has some, if that is wanted. Read only."""
    root, made = tmp_path_factory.mktemp("odd"), dict[tuple[str, bool], Path]()

    def base_of(family: str, dropout: bool = False) -> Path:
        if (family, dropout) not in made:
            changes = ODD[family] | (DROPOUTS[family] if dropout else {})
            made[family, dropout] = make(root / f"{family}-{dropout}", family, **changes)
        return made[family, dropout]

    return base_of


@pytest.fixture(scope="session")
def odd_base(odd_bases: Callable[..., Path]) -> Path:
    """A tiny LOLA with an inner size of its own; read only."""
    return odd_bases("lola")


@dataclass(frozen=True)
class Batch:
    """The shape of a micro batch, and how it is computed."""

    rows: int = 2
    length: int = 64
    packing: bool = True
    checkpointing: bool = False


def adapted(base: Path, quantization: str | None, dtype: str, settings: AdapterSettings) -> Any:
    """A model in training with a fresh adapter."""
    return add_adapter(load_base(base, quantization, dtype, "cpu", quiet=True), settings).train()


def checkpointed(model: Any) -> None:
    """Turn gradient checkpointing on, as the trainer does it."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


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
    """Bytes of all storages that autograd saves in a forward pass; parameters, buffers and masks are left out.

    A mask (B, 1, S, S) is held in any case; whether it is an input of checkpoints depends on how layers are called.
    """

    def measure(model: Any, batch: Batch, half: bool) -> int:
        if batch.checkpointing:
            checkpointed(model)
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            is_mask = tensor.dtype == torch.bool and tensor.ndim == 4
            if tensor.untyped_storage().data_ptr() not in own and not is_mask:
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


def job_of(
    base: Architecture | Any, settings: AdapterSettings, quantization: str | None, dtype: str, batch: Batch
) -> Job:
    """Tell the planner of a batch, on a CPU.

    Args:
        base: Its architecture or config.
    """
    return Job(
        base if isinstance(base, Architecture) else architecture_of(base),
        settings,
        quantization,
        dtype,
        "cpu",
        micro_batch_size=batch.rows,
        length=batch.length,
        packing=batch.packing,
        checkpointing=batch.checkpointing,
    )
