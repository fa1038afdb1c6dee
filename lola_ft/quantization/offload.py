"""4-bit experts whose store is in host memory, and on the device only while they compute."""

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
    """NF4Experts with a store on the host.

    The weights and scales that the module has by name are views of a buffer on the device, which two layers and more
    share: they are this layer's inside `in_memory` and anything outside.
    """

    def __init__(self, copies: LayerCopies, **settings: Any) -> None:
        super().__init__(**settings)
        self._copies = copies
        self._number = -1
        self._host: dict[str, Tensor] = {}

    def allocate(self, device: torch.device) -> None:
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
        return self._copies.use(self._number)

    def put(self, name: str, tensor: Tensor) -> None:
        if name in self._host:
            self._host[name].copy_(tensor)
        else:
            super().put(name, tensor)

    def stored(self, part: str, expert_id: int, held: Callable[[str], Tensor] | None = None) -> NF4:
        """Return one expert's quantised weight (views into the store on the host)."""
        return super().stored(part, expert_id, held or self._host.__getitem__)

    def expert_weight(self, part: str, expert_id: int, dtype: torch.dtype) -> Tensor:
        stored, device = self.stored(part, expert_id), self.absmax_code.device
        moved = NF4(*(t.to(device) for t in (stored.packed, stored.absmax, stored.absmax2, stored.offset)))
        return dequantize(moved, self.absmax_code, self.part_shape(part), dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "OffloadedExperts":  # noqa: ARG002
        """Move or cast the biases only; the store stays where it is."""
        if fn(torch.empty(0, device=self.absmax_code.device)).device != self.absmax_code.device:
            raise UserError("Experts that are offloaded stay with their device; load the base anew for another one.")
        for name, parameter in self.named_parameters(recurse=False):
            if name not in self.shapes:
                parameter.data = fn(parameter.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._host.items():
            destination[prefix + name] = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("experts that are offloaded are not copied; load the base again.")


def copies_for(
    offload: str | None, architecture: Architecture, quantization: str | None, device: torch.device
) -> LayerCopies | None:
    """Return what brings experts to the device, or None where all weights are there.

    Raises:
        UserError: Saying why experts cannot be kept in host memory here.
    """
    if offload in (None, "none"):
        return None
    if offload != "experts":
        raise UserError(f"offload '{offload}' is not known; use 'experts' or None.")
    architecture.refuse_offload(quantization, device.type)
    return LayerCopies(transfers_for(device))


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """A part of some bytes with the shape and dtype of a tensor."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
