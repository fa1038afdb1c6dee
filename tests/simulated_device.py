"""A device simulated on the CPU, for experts in host memory. Its copies are as late and as early as events allow."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lola_ft.families import Architecture
from lola_ft.quantization import offload

_GARBAGE = 0xCC


def simulate(patch: pytest.MonkeyPatch) -> list["SimulatedTransfers"]:
    """Make each base with experts in host memory load to its own simulated device; return the list of these devices."""
    made = list[SimulatedTransfers]()

    def make(_: torch.device) -> SimulatedTransfers:
        made.append(SimulatedTransfers())
        return made[-1]

    patch.setattr(offload, "transfers_for", make)
    patch.setattr(Architecture, "refuse_offload", lambda *_: None)
    return made


@dataclass(eq=False)
class Event:
    """The end of a copy, or (without `copy`) the end of all computation so far. Events are numbered in order."""

    number: int
    copy: tuple[Tensor, Tensor] | None = None


@dataclass
class SimulatedTransfers:
    """The `Transfers` of a device that computes at once, and whose copies end only when they are waited for.

    From the beginning of a copy until it is waited for, its buffer holds garbage. A copy that could overwrite a buffer
    in use is refused: the event that it waits for must be the mark of the buffer's last use, or a later mark.

    Attributes:
        log: ("copy", layer), ("wait", layer) and ("mark",) in order.
        stores, buffers: The memory that was handed out, on the host and on the device.
    """

    log: list[tuple[Any, ...]] = field(default_factory=list)
    stores: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    _computes: int | None = None
    _last_use: dict[int, int] = field(default_factory=dict)
    _events: int = 0

    def host_memory(self, num_bytes: int) -> Tensor:
        self.stores.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return self.stores[-1]

    def device_memory(self, num_bytes: int) -> Tensor:
        self.buffers.append(torch.full((num_bytes,), _GARBAGE, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, source: Tensor, target: Tensor, after: Event | None) -> Event:
        buffer = self._number(target, self.buffers)
        assert buffer != self._computes, "a buffer is overwritten while a layer computes with it"
        free_from = self._last_use.get(buffer, 0)
        assert free_from <= (after.number if after else 0), "a copy does not wait for the last use of its buffer"
        target.fill_(_GARBAGE)
        self.log.append(("copy", self._number(source, self.stores)))
        return self._event((source, target))

    def wait(self, event: Event) -> None:
        assert event.copy is not None, "only copies are waited for"
        source, target = event.copy
        if self._number(target, self.buffers) != self._computes:
            target.copy_(source)
        self._computes = self._number(target, self.buffers)
        self.log.append(("wait", self._number(source, self.stores)))

    def mark(self) -> Event:
        event = self._event()
        if self._computes is not None:
            self._last_use[self._computes] = event.number
        self._computes = None
        self.log.append(("mark",))
        return event

    def copied(self) -> list[int]:
        """Return the layers in the order of their copies, and forget them."""
        layers = [entry[1] for entry in self.log if entry[0] == "copy"]
        self.log.clear()
        return layers

    def _event(self, copy: tuple[Tensor, Tensor] | None = None) -> Event:
        self._events += 1
        return Event(self._events, copy)

    @staticmethod
    def _number(tensor: Tensor, among: list[Tensor]) -> int:
        return next(number for number, one in enumerate(among) if one is tensor)
