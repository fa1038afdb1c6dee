"""Layers' stores in host memory, each copied to the device while the layer before it computes.

The device has two buffers. Layer `i` is always copied into buffer `i % 2`. So neighbouring layers never share a buffer,
forward or backward, and the tensors of a layer always have the same address. With 4 layers, a step without gradient
checkpointing does:

    compute      0   1   2   3   3   2   1   0    forward, then backward; layers 2 and 3 are still in the buffers then
    copy     0   1   2   3           1   0        at the same time, except that layer 0 is copied before it computes
    into     0   1   0   1           1   0        number of the buffer

Copies have a stream of their own. Events order copies and computation, so that a copy neither arrives too late nor
overwrites weights in use; the host waits for nothing.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lola_ft.errors import UserError
from lola_ft.kernels.nf4_sizes import LAYERS_ON_DEVICE


class Transfers(Protocol):
    """Memory on both sides, copies between them, and events that order copies and computation."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return host memory from which the host can start a copy without waiting for it; uint8 (num_bytes,)."""

    def device_memory(self, num_bytes: int) -> Tensor:
        """Return memory of the device; uint8 (num_bytes,)."""

    def copy(self, source: Tensor, target: Tensor, after: Any | None) -> Any:
        """Queue a copy to the device that begins after the event `after`, and return the event of its end."""

    def wait(self, event: Any) -> None:
        """Make all computation that is queued from now on wait for an event."""

    def mark(self) -> Any:
        """Return the event that all computation queued until now is done."""


class CudaTransfers:
    """The `Transfers` of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []
        weakref.finalize(self, _unpin, self._pinned)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return pinned memory. (torch's own allocator would round it up to a power of two, up to twice the size.)

        Raises:
            UserError: If the system does not pin so much memory.
        """
        memory, cudart = torch.empty(num_bytes, dtype=torch.uint8), torch.cuda.cudart()
        if cudart.cudaHostRegister(memory.data_ptr(), num_bytes, 0) != cudart.cudaError.success:
            raise UserError(
                f"base.offload: {num_bytes:,} bytes of host memory cannot be pinned, in addition to "
                f"{sum(held.numel() for held in self._pinned):,}. Free host memory, or set base.offload=none."
            )
        self._pinned.append(memory)
        return memory

    def device_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor, after: Any | None) -> Any:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()


def transfers_for(device: torch.device) -> Transfers:
    """Return the transfers of a GPU. (Tests put a simulated device in place of this function.)"""
    return CudaTransfers(device)


class LayerCopies:
    """The layers' stores, numbered from 0 in the order in which a forward pass computes the layers."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._stores: list[Tensor] = []
        self._buffers: list[Tensor] = []
        # For each buffer: the layer in it or on its way, the event of its arrival, and the event of its last use's end.
        self._held: list[int | None] = [None] * LAYERS_ON_DEVICE
        self._arrived: list[Any] = [None] * LAYERS_ON_DEVICE
        self._left: list[Any] = [None] * LAYERS_ON_DEVICE
        self._last, self._step, self._in_use = -1, 1, False

    def add(self, num_bytes: int) -> tuple[int, Tensor, Tensor]:
        """Add a layer, and return its number, its memory on the host, and its buffer on the device."""
        number = len(self._stores)
        assert not self._stores or self._stores[0].numel() == num_bytes, "all layers have stores of one size"
        self._stores.append(self._transfers.host_memory(num_bytes))
        if number < LAYERS_ON_DEVICE:
            self._buffers.append(self._transfers.device_memory(num_bytes))
            self._left[number] = self._transfers.mark()  # this memory's earlier tensors may still be in use
        return number, self._stores[number], self._buffers[number % LAYERS_ON_DEVICE]

    @contextmanager
    def use(self, layer: int) -> Iterator[None]:
        """Have a layer's store in its buffer, and copy the layer that is likely to be next meanwhile."""
        assert not self._in_use, "layers compute one after another"
        buffer = layer % LAYERS_ON_DEVICE
        self._fetch(layer)
        self._transfers.wait(self._arrived[buffer])
        following = self._following(layer)
        if following is not None and following % LAYERS_ON_DEVICE != buffer:
            self._fetch(following)
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False
            self._left[buffer] = self._transfers.mark()

    def _fetch(self, layer: int) -> None:
        """Queue the copy of a layer into its buffer, unless the layer is there or on its way."""
        buffer = layer % LAYERS_ON_DEVICE
        if self._held[buffer] != layer:
            after = self._left[buffer]
            self._arrived[buffer] = self._transfers.copy(self._stores[layer], self._buffers[buffer], after)
            self._held[buffer] = layer

    def _following(self, layer: int) -> int | None:
        """Return the layer to copy next, or None. A wrong guess costs one copy, and changes no number.

        Layers are computed in ascending order, and for gradients in descending order after that. The last two layers
        are still in the buffers when backward begins, and the first two when the next forward pass begins. Without
        gradients the first layer follows the last.
        """
        if layer == self._last:  # backward after forward, or after the layer was computed again
            return None
        top = len(self._stores) - 1
        self._step = 1 if layer > self._last or (self._last, layer) == (top, 0) else -1
        self._last = layer
        following = layer + self._step
        if following > top:
            return None if torch.is_grad_enabled() else 0
        return following if following >= 0 else None


def _unpin(pinned: list[Tensor]) -> None:
    """Undo the pinning of `CudaTransfers.host_memory`."""
    for memory in pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
