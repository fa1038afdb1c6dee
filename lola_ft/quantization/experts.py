"""The fused experts of one MoE layer in NF4: the 4-bit store.

Each projection of each expert is quantised by itself, in its in×out orientation, exactly as bitsandbytes would quantise
that one tensor of the Hub's checkpoint. The stacked parts are, for E experts and n = in*out weights an expert:

    up_proj, down_proj      (E, n/2)        uint8    two codes a byte; a parameter, so that PEFT finds it by name
    …_absmax                (E, n/64)       uint8    scale of each block
    …_absmax2               (E, n/64/256)   float32  scale of each block of scales
    …_offset                (E,)            float32  mean of the scales
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lola_ft.kernels.nf4_sizes import packed_sizes
from lola_ft.kernels.stacks import NF4Stack, WeightStack
from lola_ft.kernels.tiles import Tiles
from lola_ft.model.experts import PROJECTIONS, LolaExperts
from lola_ft.quantization.nf4 import (
    NF4,
    dequantize,
    dequantize_stack,
    dynamic_code,
    nf4_code,
    quantize,
    stack_scales,
    tiles_of,
)


class NF4Experts(LolaExperts):
    """LolaExperts with 4-bit weights; biases stay as they are. Allocated empty, filled by `load_expert`."""

    def _make_weights(self) -> None:
        for name, (in_features, out_features) in self.shapes.items():
            packed, blocks, superblocks = packed_sizes(in_features * out_features)
            e = self.num_experts
            weight = nn.Parameter(torch.empty(e, packed, dtype=torch.uint8), requires_grad=False)
            self.register_parameter(name, weight)
            self.register_buffer(f"{name}_absmax", torch.empty(e, blocks, dtype=torch.uint8))
            self.register_buffer(f"{name}_absmax2", torch.empty(e, superblocks, dtype=torch.float32))
            self.register_buffer(f"{name}_offset", torch.empty(e, dtype=torch.float32))
        self.register_buffer("absmax_code", torch.empty(256, dtype=torch.float32), persistent=False)

    def allocate(self, device: torch.device) -> None:
        """Give a module made on the meta device its memory. (Biases are left to the loader.)"""
        for name in PROJECTIONS:
            weight = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False))
            for part in ("absmax", "absmax2", "offset"):
                buffer = getattr(self, f"{name}_{part}")
                setattr(self, f"{name}_{part}", torch.empty_like(buffer, device=device))
        self.absmax_code = dynamic_code().to(device)

    def load_expert(self, name: str, expert_id: int, weight: Tensor) -> None:
        """Quantise one expert's dense weight (in, out) into its slot."""
        nf4 = quantize(weight)
        getattr(self, name).data[expert_id] = nf4.packed
        getattr(self, f"{name}_absmax")[expert_id] = nf4.absmax
        getattr(self, f"{name}_absmax2")[expert_id] = nf4.absmax2
        getattr(self, f"{name}_offset")[expert_id] = nf4.offset

    def stored(self, name: str, expert_id: int) -> NF4:
        """One expert's quantised weight (views into the stack)."""
        return NF4(
            getattr(self, name).data[expert_id],
            getattr(self, f"{name}_absmax")[expert_id],
            getattr(self, f"{name}_absmax2")[expert_id],
            getattr(self, f"{name}_offset")[expert_id],
        )

    def expert_weight(self, name: str, expert_id: int, dtype: torch.dtype) -> Tensor:
        """One expert's dequantised weight (in, out)."""
        return dequantize(self.stored(name, expert_id), self.absmax_code, self.shapes[name], dtype)

    def weights(self, name: str) -> WeightStack:
        tiles, dense = partial(self._tiles, name), partial(self._dense, name)
        return WeightStack(None, tiles, dense, self.shapes[name][0], self._stack(name))

    def _dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """All experts' dequantised weights (E, in, out)."""
        return dequantize_stack(self._stack(name), dtype)

    def _stack(self, name: str) -> NF4Stack:
        return NF4Stack(
            getattr(self, name).data,
            getattr(self, f"{name}_absmax"),
            getattr(self, f"{name}_absmax2"),
            getattr(self, f"{name}_offset"),
            self.absmax_code,
            nf4_code(self.absmax_code.device),
            self.shapes[name],
        )

    def _tiles(self, name: str, expert_ids: list[int], dtype: torch.dtype) -> Iterator[Tiles]:
        scales = stack_scales(self._stack(name), expert_ids)
        for expert_id, scales_of_one in zip(expert_ids, scales, strict=True):
            yield tiles_of(getattr(self, name).data[expert_id], scales_of_one, self.shapes[name], dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Experts":
        """Follow `.to(device)`, but keep the scales float32 under `.half()` or `.to(dtype)`."""
        scales = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("4-bit experts are not pickled; save their state_dict as safetensors.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "NF4Experts":
        hidden_size, inner_size = self.shapes["up_proj"]
        with torch.device("meta"):
            copy = NF4Experts(hidden_size, inner_size, self.num_experts)
        memo[id(self)] = copy
        for name, parameter in self.named_parameters(recurse=False):
            setattr(copy, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
        for name, buffer in self.named_buffers(recurse=False):
            setattr(copy, name, buffer.clone())
        return copy.train(self.training)
