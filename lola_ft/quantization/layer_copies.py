"""Layers' stores in host memory, each copied to the device while the layer before it computes.

The device has two buffers. Layer `i` always comes into buffer `i % 2`, so that layers that follow one another, forward
or backward, never share one, and a layer's tensors have one address for good. Copies have a stream of their own;
events order them and the computation, and the host waits for nothing.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lola_ft.errors import UserError

_BUFFERS = 2


class Transfers(Protocol):
    """Memory on both sides, copies between them, and events that order copies and computation."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return bytes of host memory, from which copies do not hold the host up; uint8."""

    def device_memory(self, num_bytes: int) -> Tensor:
        """Return bytes of the device's memory; uint8."""

    def copy(self, source: Tensor, target: Tensor, after: Any | None) -> Any:
        """Begin a copy to the device as soon as the event `after` has happened; return the event of its end."""

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""

    def mark(self) -> Any:
        """Return the event that all that was to be computed until now is done."""


class CudaTransfers:
    """See `Transfers`; for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []
        weakref.finalize(self, _unpin, self._pinned)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return pinned memory. (torch's own allocator would round it up to a power of two, up to twice as much.)"""
        memory, cudart = torch.empty(num_bytes, dtype=torch.uint8), torch.cuda.cudart()
        if cudart.cudaHostRegister(memory.data_ptr(), num_bytes, 0) != cudart.cudaError.success:
            raise UserError(
                f"base.offload: {num_bytes:,} bytes of host memory cannot be pinned, after "
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
    """Return a GPU's transfers."""
    return CudaTransfers(device)


class LayerCopies:
    """The layers' stores, numbered from 0 in the order in which a forward pass meets them."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._stores: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._held: list[int | None] = [None] * _BUFFERS  # the layer that a buffer has, or that is on its way
        self._arrived: list[Any] = [None] * _BUFFERS  # that it is there
        self._left: list[Any] = [None] * _BUFFERS  # that nothing computes with what a buffer has
        self._last, self._step, self._in_use = -1, 1, False

    def add(self, num_bytes: int) -> tuple[int, Tensor, Tensor]:
        """Make room for one more layer; return its number, its bytes on the host, and its buffer on the device."""
        number = len(self._stores)
        assert not self._stores or self._stores[0].numel() == num_bytes, "all layers have stores of one size"
        self._stores.append(self._transfers.host_memory(num_bytes))
        if number < _BUFFERS:
            self._buffers.append(self._transfers.device_memory(num_bytes))
            self._left[number] = self._transfers.mark()  # what had this memory before may still be computed with
        return number, self._stores[number], self._buffers[number % _BUFFERS]

    @contextmanager
    def use(self, layer: int) -> Iterator[None]:
        """Compute with a layer's store inside; the layer that is likely to be next is fetched meanwhile."""
        assert not self._in_use, "layers compute one after another"
        buffer = layer % _BUFFERS
        self._fetch(layer)
        self._transfers.wait(self._arrived[buffer])
        following = self._following(layer)
        if following is not None and following % _BUFFERS != buffer:
            self._fetch(following)
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False
            self._left[buffer] = self._transfers.mark()

    def _fetch(self, layer: int) -> None:
        """Begin to copy a layer into its buffer, unless it is there or on its way."""
        buffer = layer % _BUFFERS
        if self._held[buffer] != layer:
            after = self._left[buffer]
            self._arrived[buffer] = self._transfers.copy(self._stores[layer], self._buffers[buffer], after)
            self._held[buffer] = layer

    def _following(self, layer: int) -> int | None:
        """Return the layer that is likely to be used next and is not there; a wrong guess costs a copy, no more.

        Passes go up, and with gradients down again: then the last two layers are there when the way back begins, and
        the first two when the next pass does. Without gradients the first layer follows the last.
        """
        if layer == self._last:  # backward after forward, or after a recomputation
            return None
        top = len(self._stores) - 1
        self._step = 1 if layer > self._last or (self._last, layer) == (top, 0) else -1
        self._last = layer
        following = layer + self._step
        if following > top:
            return None if torch.is_grad_enabled() else 0
        return following if following >= 0 else None


def _unpin(pinned: list[Tensor]) -> None:
    for memory in pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
