"""The fused experts of one MoE layer in NF4: the 4-bit store.

Each weight of each expert is quantised separately, in the orientation of the family's files, exactly as bitsandbytes
would quantise that tensor. The gate and the up projection of a gated expert are quantised separately, too. For E
experts and n values per tensor, a projection consists of:

    up_proj, down_proj      (E, n/2)        uint8    two codes per byte; a parameter, so that PEFT finds it by name
    …_absmax                (E, n/64)       uint8    scale of each block
    …_absmax2               (E, n/64/256)   float32  scale of each block of scales
    …_offset                (E,)            float32  mean of the scales

`gate_up_proj` has two tensors per expert, gate then up, so that all shapes have a second dimension of two, (E, 2, …).
Sizes are rounded up to whole bytes, blocks and blocks of scales.

Shape suffixes: E experts, P parts (2 in `gate_up_proj`, else 1), I rows and O columns of a matrix as stored.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lola_ft.kernels.nf4_sizes import packed_sizes
from lola_ft.kernels.stacks import NF4Stack, WeightStack
from lola_ft.kernels.tiles import Tiles, one_below_another, side_by_side
from lola_ft.model.experts import FusedExperts
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

_SCALES = ("absmax", "absmax2", "offset")


class NF4Experts(FusedExperts):
    """FusedExperts with 4-bit weights and dense biases. Made on the meta device, allocated empty, then filled.

    `allocate` gives memory, `load_expert` fills in one expert's weight.
    """

    def _make_weights(self) -> None:
        for name in self.shapes:
            packed, blocks, superblocks = packed_sizes(self.hidden_size * self.inner_size)
            parts = _num_parts(name)
            tensors = (self.num_experts,) if parts == 1 else (self.num_experts, parts)
            weight = nn.Parameter(torch.empty(*tensors, packed, dtype=torch.uint8), requires_grad=False)
            self.register_parameter(name, weight)
            self.register_buffer(f"{name}_absmax", torch.empty(*tensors, blocks, dtype=torch.uint8))
            self.register_buffer(f"{name}_absmax2", torch.empty(*tensors, superblocks, dtype=torch.float32))
            self.register_buffer(f"{name}_offset", torch.empty(tensors, dtype=torch.float32))
        self.register_buffer("absmax_code", torch.empty(256, dtype=torch.float32), persistent=False)

    def allocate(self, device: torch.device) -> None:
        """Give a module made on the meta device its memory on `device`. Biases are left to the loader."""
        for name in self.shapes:
            weight = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False))
            for part in _SCALES:
                buffer = getattr(self, f"{name}_{part}")
                setattr(self, f"{name}_{part}", torch.empty_like(buffer, device=device))
        self.absmax_code = dynamic_code().to(device)

    def load_expert(self, part: str, expert_id: int, weight: Tensor) -> None:
        """Quantise one expert's dense weight into its place.

        Args:
            part: `up_proj`, `down_proj` or, for gated experts, `gate_proj`.
            weight: In the shape and orientation of the family's files.
        """
        shape = self.part_shape(part)
        assert tuple(weight.shape) == shape, f"{part} of an expert is {shape}, not {tuple(weight.shape)}"
        quantize(weight, self.stored(part, expert_id))

    def stored(self, part: str, expert_id: int) -> NF4:
        """Return one expert's quantised weight, as views into the stack."""
        projection, number = self.parts[part]
        stack = self._stack(projection)
        # Matrices are numbered expert by expert, then part by part.
        matrix = expert_id * stack.parts + number
        return NF4(stack.packed[matrix], stack.absmax[matrix], stack.absmax2[matrix], stack.offset[matrix])

    def expert_weight(self, part: str, expert_id: int, dtype: torch.dtype) -> Tensor:
        """Return one expert's dequantised weight, in the shape and orientation of the family's files."""
        return dequantize(self.stored(part, expert_id), self.absmax_code, self.part_shape(part), dtype)

    def weights(self, name: str) -> WeightStack:
        return WeightStack(
            *self.shapes[name],
            self.is_transposed,
            None,
            getattr(self, f"{name}_bias"),
            partial(self._tiles, name),
            partial(self._dense, name),
            self._stack(name),
        )

    def _dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return all experts' dequantised weights (E, rows, columns), in the orientation of the family's files.

        The parts of a projection lie one below another (weights are out×in), or side by side (transposed: in×out).
        """
        # (E * P, I, O) -> (E, P, I, O) -> (E, P * I, O), or transposed (E, I, P, O) -> (E, I, P * O)
        matrices_EPIO = dequantize_stack(self._stack(name), dtype).unflatten(0, (self.num_experts, -1))
        if self.is_transposed:
            matrices_EPIO = matrices_EPIO.transpose(1, 2)
        return matrices_EPIO.reshape(self.num_experts, *self.part_shape(name))

    def _stack(self, name: str) -> NF4Stack:
        """Return a projection's tensors for the kernels, with (E, P, …) flattened to (E * P, …)."""
        parts = _num_parts(name)
        tensors = [getattr(self, name).data, *(getattr(self, f"{name}_{scale}") for scale in _SCALES)]
        if parts > 1:
            tensors = [tensor.flatten(0, 1) for tensor in tensors]
        packed, absmax, absmax2, offset = tensors
        shape = self.part_shape("down_proj" if name == "down_proj" else "up_proj")
        codes = self.absmax_code, nf4_code(self.absmax_code.device)
        return NF4Stack(packed, absmax, absmax2, offset, *codes, shape, parts)

    def _tiles(self, name: str, expert_ids: list[int], dtype: torch.dtype) -> Iterator[Tiles]:
        """Yield each expert's dequantised weight as tiles, its parts put together as in `_dense`."""
        stack = self._stack(name)
        matrices = [expert_id * stack.parts + part for expert_id in expert_ids for part in range(stack.parts)]
        scales = stack_scales(stack, matrices)
        tiles = [tiles_of(stack.packed[m], own, stack.shape, dtype) for m, own in zip(matrices, scales, strict=True)]
        for first in range(0, len(tiles), stack.parts):
            parts = tiles[first : first + stack.parts]
            if stack.parts == 1:
                yield parts[0]
            else:
                yield side_by_side(parts) if self.is_transposed else one_below_another(parts, stack.shape[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Experts":
        """Follow `.to(device)`, but keep the scales in float32 under `.half()` or `.to(dtype)`."""
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
        with torch.device("meta"):
            copy = NF4Experts(**self.settings)
        memo[id(self)] = copy
        for name, parameter in self.named_parameters(recurse=False):
            setattr(copy, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
        for name, buffer in self.named_buffers(recurse=False):
            setattr(copy, name, buffer.clone())
        return copy.train(self.training)


def _num_parts(projection: str) -> int:
    """Return the number of tensors in the family's files that make up one expert's projection."""
    return 2 if projection == "gate_up_proj" else 1
