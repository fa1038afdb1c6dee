"""Reused memory. New memory for every piece would take more time than adding the update."""

from collections import deque

import torch
from torch import Tensor


class Buffers:
    """A pool of memory that lends tensors. Safe for use by several threads."""

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque()
        self._taken: dict[int, Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor with undefined content."""
        num_bytes = numel * dtype.itemsize
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        if len(memory) < num_bytes:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._taken[memory.data_ptr()] = memory
        return memory[:num_bytes].view(dtype)

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor's memory to the pool. A tensor that is not from the pool is ignored."""
        memory = self._taken.pop(tensor.data_ptr(), None)
        if memory is not None:
            self._free.append(memory)
