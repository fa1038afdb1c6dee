"""4-bit experts whose store is in host memory, and on the device only while they are computed with.

All tensors of a layer's store (codes and scales of both projections) lie one after another in one piece of memory, so
that one copy brings the layer to the device. `LayerCopies` has the memory on both sides and decides when to copy.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lola_ft.errors import UserError
from lola_ft.families import Architecture
from lola_ft.kernels.nf4_sizes import starts_of_store
from lola_ft.quantization.experts import NF4Experts
from lola_ft.quantization.layer_copies import LayerCopies, transfers_for
from lola_ft.quantization.nf4 import NF4, dequantize, dynamic_code


class OffloadedExperts(NF4Experts):
    """NF4Experts with their store on the host.

    The module's own parameters and buffers of the store are views of a buffer on the device that every second layer
    shares. They hold this layer's values inside `in_memory`, and any layer's values outside. The store itself is
    `_host`, by the same names. Biases stay on the device.

    Args:
        copies: Has the memory of all layers, and copies them.
        settings: Arguments of `FusedExperts`.
    """

    def __init__(self, copies: LayerCopies, **settings: Any) -> None:
        super().__init__(**settings)
        self._copies = copies
        self._number = -1
        self._host: dict[str, Tensor] = {}

    def allocate(self, device: torch.device) -> None:
        """Give the store memory on the host, and its names views of the layer's buffer on `device`."""
        names = self.stored_names
        starts, size = starts_of_store(getattr(self, name).nbytes for name in names)
        self._number, on_host, on_device = self._copies.add(size)
        for name, start in zip(names, starts, strict=True):
            like = getattr(self, name)
            self._host[name] = _view(on_host, start, like)
            view = _view(on_device, start, like)
            setattr(self, name, nn.Parameter(view, requires_grad=False) if name in self.shapes else view)
        self.absmax_code = dynamic_code().to(device)

    def in_memory(self) -> AbstractContextManager[None]:
        """Return a context in which this layer's store is in its buffer on the device."""
        return self._copies.use(self._number)

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor of the store to the host; set any other parameter or buffer to it."""
        if name in self._host:
            self._host[name].copy_(tensor)
        else:
            super().put(name, tensor)

    def stored(self, part: str, expert_id: int, held: Callable[[str], Tensor] | None = None) -> NF4:
        """Return one expert's quantised weight, as views into the store on the host."""
        return super().stored(part, expert_id, held or self._host.__getitem__)

    def expert_weight(self, part: str, expert_id: int, dtype: torch.dtype) -> Tensor:
        """Return one expert's dequantised weight on the device, copied there for this call."""
        stored, device = self.stored(part, expert_id), self.absmax_code.device
        moved = NF4(*(t.to(device) for t in (stored.packed, stored.absmax, stored.absmax2, stored.offset)))
        return dequantize(moved, self.absmax_code, self.part_shape(part), dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "OffloadedExperts":  # noqa: ARG002
        """Cast the biases only. The store keeps its dtypes and its place."""
        if fn(torch.empty(0, device=self.absmax_code.device)).device != self.absmax_code.device:
            raise UserError("Offloaded experts cannot be moved to another device. Load the base again for that device.")
        for name, parameter in self.named_parameters(recurse=False):
            if name not in self.shapes:
                parameter.data = fn(parameter.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the store from the host, in place of the views of the buffer."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._host.items():
            destination[prefix + name] = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("offloaded experts cannot be copied; load the base again.")


def copies_for(
    offload: str | None, architecture: Architecture, quantization: str | None, device: torch.device
) -> LayerCopies | None:
    """Return the copies of experts from host memory to the device; None if all weights stay on the device.

    Args:
        offload: "experts", or "none" or None.
        quantization: "nf4" or None.

    Raises:
        UserError: If `offload` is unknown, or experts cannot be kept in host memory; names the reason.
    """
    if offload in (None, "none"):
        return None
    if offload != "experts":
        raise UserError(f"offload '{offload}' is not known; use 'experts' or None.")
    architecture.refuse_offload(quantization is not None, device.type)
    return LayerCopies(transfers_for(device))


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes from `start` on (uint8 memory), viewed with the shape and dtype of a tensor."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
