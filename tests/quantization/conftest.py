"""Small bases on disk to load in 4 bit, and NF4 in plain torch as a reference."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.quantization import NF4Experts
from lola_ft.quantization.nf4 import NF4

BaseWriter = Callable[..., Path]


@pytest.fixture(scope="session")
def write_base(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., LolaConfig]) -> BaseWriter:
    """Write a random base (hidden 64, inner 128, 4 experts, 4 layers) and return its folder."""

    def write(seed: int = 0, dtype: torch.dtype = torch.float32, shard: str | None = None, **changes: Any) -> Path:
        torch.manual_seed(seed)
        model = LolaForCausalLM(make_config(**{"n_positions": 64} | changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)  # zeros would hide a lost bias
        folder = tmp_path_factory.mktemp("base")
        model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "repetition_penalty": 1.25}))
        return folder

    return write


@pytest.fixture(scope="session")
def base(write_base: BaseWriter) -> Path:
    """A random base in float32; read only."""
    return write_base()


@pytest.fixture(scope="session")
def make_experts() -> Callable[..., tuple[NF4Experts, dict[str, Tensor]]]:
    """Make 4-bit experts, and return the dense weights of each part that they were quantised from, too."""

    def make(
        hidden: int = 64, inner: int = 128, num_experts: int = 4, **layout: Any
    ) -> tuple[NF4Experts, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(hidden)
        with torch.device("meta"):
            experts = NF4Experts(hidden, inner, num_experts, **layout)
        experts.allocate(torch.device("cpu"))
        dense = {}
        for part in experts.parts:
            dense[part] = torch.randn(num_experts, *experts.part_shape(part), generator=generator) * 0.2
            for e in range(num_experts):
                experts.load_expert(part, e, dense[part][e])
        for name, meta in list(experts.named_parameters()):
            if name.endswith("_bias"):
                bias = torch.randn(meta.shape, generator=generator) * 0.2
                setattr(experts, name, torch.nn.Parameter(bias, requires_grad=False))
        return experts, dense

    return make


class Reference:
    """NF4 with double quantisation in plain torch (QLoRA, arXiv 2305.14314, appendix E)."""

    levels = torch.tensor(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ]
    )

    @classmethod
    def codes(cls, weight: Tensor) -> Tensor:
        """Return the code of the level nearest to each value / its block's absmax, in blocks of 64 in memory order."""
        flat = weight.float().reshape(-1)
        absmax = torch.stack([block.abs().max() for block in flat.split(64)])
        scaled = flat / absmax.repeat_interleave(64)[: flat.numel()]
        return (scaled[:, None] - cls.levels).abs().argmin(-1)

    @classmethod
    def unpack(cls, nf4: NF4, numel: int) -> Tensor:
        """Return the codes, which are packed two per byte, the first in the high bits."""
        return torch.stack([nf4.packed >> 4, nf4.packed & 15], dim=1).reshape(-1)[:numel].long()

    @classmethod
    def scales(cls, nf4: NF4) -> Tensor:
        """Return each block's scale, from its 8-bit code in blocks of 256 around the mean."""
        coarse = nf4.absmax2.repeat_interleave(256)[: nf4.absmax.numel()]
        return bnb.create_dynamic_map()[nf4.absmax.long()] * coarse + nf4.offset

    @classmethod
    def dequantize(cls, nf4: NF4, shape: tuple[int, ...]) -> Tensor:
        numel = torch.Size(shape).numel()
        scales = cls.scales(nf4).repeat_interleave(64)[:numel]
        return (cls.levels[cls.unpack(nf4, numel)] * scales).reshape(shape)


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


class SavedBytes:
    """Counts the bytes that autograd saves for backward, without the tensors in `known` (parameters, inputs)."""

    def __init__(self, *known: Tensor) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages: dict[int, int] = {}

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._keep(tensor)
        return tensor

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage.nbytes()

    def add_contexts(self, out: Tensor) -> None:
        """Count the tensors in attributes of custom functions' contexts, too."""
        nodes, seen = [out.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            for value in getattr(node, "__dict__", {}).values():
                self._keep_all(value)

    def _keep_all(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._keep(value)
        elif isinstance(value, tuple | list):
            for item in value:
                self._keep_all(item)
        elif is_dataclass(value):
            for one in fields(value):
                self._keep_all(getattr(value, one.name))

    @property
    def total(self) -> int:
        return sum(self._storages.values())


@pytest.fixture(scope="session")
def saved_bytes() -> type[SavedBytes]:
    return SavedBytes
