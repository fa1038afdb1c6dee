"""The adapter's updates, read from its file when they are wanted: a whole adapter may be larger than the memory."""

import torch
from torch import Tensor

from lola_ft.adapters.files import StoredAdapter
from lola_ft.adapters.stacks import split_b

_STACKS_KEPT = 2  # a layer's up and down projections take turns in the file


class Deltas:
    """What an adapter does to each weight of a checkpoint (Hub names, in×out).

    Attributes:
        outline: The adapter's pairs and trained weights, shapes alone.
    """

    def __init__(self, stored: StoredAdapter, num_experts: int) -> None:
        self.outline = stored.outline(num_experts)
        self._entries = stored.entries
        self._num_experts = num_experts
        self._stacks: dict[str, Tensor] = {}
        self._name = ""  # the tensor whose numbers are at hand
        self._pair: tuple[Tensor, Tensor] | None = None
        self._trained: Tensor | None = None
        self._update = torch.empty(0)

    def tensors_for(self, name: str) -> list[str]:
        """The adapter's tensors that change this weight, by module and factor; none if it leaves it alone."""
        if name in self.outline.trained:
            return [name]
        module = name.removesuffix(".weight")
        return [f"{module}.lora_A", f"{module}.lora_B"] if module in self.outline.pairs and module != name else []

    def update(self, name: str, start: int, values: Tensor) -> Tensor:
        """What to add to the values there, float32: `scaling * (b @ a)^T` (LoRA, arXiv 2106.09685).

        Args:
            start: Place of the first value in the flat weight; a row's first.
            values: Flat; whole rows.

        Returns:
            Flat, in memory that the next call uses again.
        """
        self._fetch(name)
        if len(self._update) < values.numel():
            self._update = torch.empty(values.numel())
        update = self._update[: values.numel()]
        if self._trained is not None:
            return torch.sub(self._trained.view(-1)[start : start + values.numel()], values, out=update)
        assert self._pair is not None, f"{name}: the adapter does not change it"
        a_RI, b_RO = self._pair
        update_IO = update.view(-1, b_RO.shape[1])
        row = start // b_RO.shape[1]
        part_IR = a_RI[:, row : row + len(update_IO)].t()
        scaling = self.outline.scaling(name.removesuffix(".weight"))
        torch.addmm(update_IO, part_IR, b_RO, beta=0, alpha=scaling, out=update_IO)
        return update

    def trained(self, name: str, start: int, values: Tensor) -> Tensor | None:
        """The values that stand in these ones' place, float32, if the weight was trained as it is."""
        self._fetch(name)
        return None if self._trained is None else self._trained.view(-1)[start : start + values.numel()]

    def _fetch(self, name: str) -> None:
        """Read what changes this weight, float32."""
        if name == self._name:
            return
        self._pair = self._trained = None
        if name in self.outline.trained:
            (key,) = self.outline.keys[name]
            self._trained = self._entries[key].read(torch.float32)
        else:
            self._pair = self._read_pair(name.removesuffix(".weight"))
        self._name = name

    def _read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and B^T (R, out) of one module, cut from its layer's stack if it is an expert in one."""
        key_a, key_b = self.outline.keys[module]
        entry_a, entry_b = self._entries[key_a], self._entries[key_b]
        rank = self.outline.pairs[module].rank
        if entry_a.shape[0] == rank:
            return entry_a.read(torch.float32), entry_b.read(torch.float32).t().contiguous()
        expert = int(module.split(".")[-2])
        a_RI = entry_a.rows(expert * rank, (expert + 1) * rank).read(torch.float32)
        return a_RI, split_b(self._stack(key_b), self._num_experts)[expert].t().contiguous()

    def _stack(self, key: str) -> Tensor:
        """A layer's stacked B; an expert's values are spread over all of it, so it is kept for the next expert."""
        if key not in self._stacks:
            while len(self._stacks) >= _STACKS_KEPT:
                self._stacks.pop(next(iter(self._stacks)))
            self._stacks[key] = self._entries[key].read(torch.float32)
        return self._stacks[key]
