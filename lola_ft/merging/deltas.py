"""The adapter's updates, read from its file one at a time: a whole adapter may be larger than the memory."""

import torch
from torch import Tensor

from lola_ft.adapters.on_disk import StoredAdapter
from lola_ft.adapters.stacks import split_b
from lola_ft.families.expert_layout import ExpertName
from lola_ft.merging.merge_base import MergeBase

_STACKS_KEPT = 2  # a layer's two stacks take turns in the file


class Deltas:
    """The changes of an adapter to each weight of a checkpoint, by Hub names and as the checkpoint stores it.

    Attributes:
        outline: The adapter's pairs and trained weights, with shapes only.
    """

    def __init__(self, stored: StoredAdapter, base: MergeBase) -> None:
        self.outline = stored.outline(base.architecture)
        self._base = base
        self._entries = stored.entries
        self._num_experts = base.architecture.num_experts
        self._stacks: dict[str, Tensor] = {}
        self._name = ""  # the tensor whose numbers are at hand
        self._pair: tuple[Tensor, Tensor] | None = None
        self._factor: Tensor | None = None
        self._trained: Tensor | None = None
        self._rows: Tensor | None = None
        self._update = torch.empty(0)

    def tensors_for(self, name: str) -> list[str]:
        """List the adapter's tensors that change this weight, by module and factor; empty if none does."""
        if name in self.outline.trained:
            return [name]
        if name in self.outline.token_rows:
            return [f"{name.removesuffix('.weight')}.token_rows"]
        module = name.removesuffix(".weight")
        if module not in self.outline.pairs or module == name:
            return []
        lengths = [f"{module}.lora_magnitude"] if self.outline.pairs[module].magnitude is not None else []
        return [f"{module}.lora_A", f"{module}.lora_B", *lengths]

    def update(self, name: str, start: int, values: Tensor) -> Tensor:
        """Return what to add to the values there, float32: `scaling * b @ a`, oriented as stored (arXiv 2106.09685).

        With DoRA (arXiv 2402.09353), what makes `factor * (values + that)` of them; `factor` is one number per output.

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
        if self._rows is not None:
            return torch.sub(self._with_rows(name, start, values), values, out=update)
        if self._trained is not None:
            return torch.sub(self._trained[start : start + values.numel()], values, out=update)
        self._product(name, start, update)
        if self._factor is not None:
            columns = self._base.entries[name].shape[-1]
            factor = self._factor
            if not self.outline.is_in_by_out(name.removesuffix(".weight")):  # outputs are rows
                factor = factor[start // columns : (start + values.numel()) // columns, None]
            update.add_(values).view(-1, columns).mul_(factor)
            update.sub_(values)
        return update

    def _product(self, name: str, start: int, update: Tensor) -> None:
        """Fill in the product of the factors for whole rows of the stored weight."""
        assert self._pair is not None, f"{name}: the adapter does not change it"
        rows_RX, columns_RY = self._pair
        update_XY = update.view(-1, columns_RY.shape[1])
        row = start // columns_RY.shape[1]
        part_XR = rows_RX[:, row : row + len(update_XY)].t()
        scaling = self.outline.scaling(name.removesuffix(".weight"))
        torch.addmm(update_XY, part_XR, columns_RY, beta=0, alpha=scaling, out=update_XY)

    def trained(self, name: str, start: int, values: Tensor) -> Tensor | None:
        """Return the values that replace the base's, float32, if the weight was fully trained; else None."""
        self._fetch(name)
        if self._rows is not None:
            return self._with_rows(name, start, values)
        return None if self._trained is None else self._trained[start : start + values.numel()]

    def _fetch(self, name: str) -> None:
        """Read what changes this weight, float32."""
        if name == self._name:
            return
        self._pair = self._trained = self._factor = self._rows = None
        if name in self.outline.trained:
            (key,) = self.outline.keys[name]
            entry = self._entries[key]
            if name.endswith(".bias") and len(entry.shape) == 2:  # a layer's stack, a row an expert
                expert = self._expert(name.removesuffix(".bias")).expert
                entry = entry.rows(expert, expert + 1)
            self._trained = entry.read(torch.float32).view(-1)
        elif name in self.outline.token_rows:
            (key,) = self.outline.keys[name]
            self._rows = self._entries[key].read(torch.float32)
        else:
            module = name.removesuffix(".weight")
            self._pair = self._read_pair(module)
            if self.outline.pairs[module].magnitude is not None:
                self._factor = self._dora_factor(name)
        self._name = name

    def _with_rows(self, name: str, start: int, values: Tensor) -> Tensor:
        """Return whole rows of an embedding, flat from `start` on, with the trained tokens' rows in their places."""
        assert self._rows is not None, f"{name}: no rows of it are trained"
        columns = self._base.entries[name].shape[-1]
        changed = values.float().view(-1, columns).clone()
        for place, token in enumerate(self.outline.token_ids):
            row = token - start // columns
            if 0 <= row < len(changed):
                changed[row] = self._rows[place]
        return changed.view(-1)

    def _dora_factor(self, name: str) -> Tensor:
        """Return DoRA's factor per output: its learned length over its length with the update, float32 (outputs,)."""
        entry, module = self._base.entries[name], name.removesuffix(".weight")
        columns, by_column = entry.shape[-1], self.outline.is_in_by_out(module)
        squares = torch.zeros(columns if by_column else entry.shape[0], dtype=torch.float64)
        for start, values in self._base.pieces(entry, columns):
            changed = torch.empty(values.numel())
            self._product(name, start, changed)
            part_XY = changed.add_(values).view(-1, columns).square()
            if by_column:
                squares += part_XY.sum(0, dtype=torch.float64)
            else:
                squares[start // columns : start // columns + len(part_XY)] = part_XY.sum(1, dtype=torch.float64)
        key = self.outline.keys[module][2]
        return (self._entries[key].read(torch.float32).double() / squares.sqrt()).float()

    def _read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Read the factors (R, rows) and (R, columns) of the stored weight; an expert's are cut from its layer's stack.

        A and B^T for a weight that is stored in×out, the other way round for one that is stored out×in.
        """
        key_a, key_b = self.outline.keys[module][:2]
        entry_a, entry_b = self._entries[key_a], self._entries[key_b]
        rank = self.outline.pairs[module].rank
        if entry_a.shape[0] == rank:
            a_RI, b_RO = entry_a.read(torch.float32), entry_b.read(torch.float32).t().contiguous()
        else:
            expert = self._expert(module)
            a_RI = entry_a.rows(expert.expert * rank, (expert.expert + 1) * rank).read(torch.float32)
            b_OR = split_b(self._stack(key_b), self._num_experts)[expert.expert]
            layout = self._base.architecture.family.experts
            assert layout is not None, "only experts are stacked"
            part, parts = layout.part_of(expert.projection)
            b_RO = b_OR.chunk(parts)[part].t().contiguous()
        return (a_RI, b_RO) if self.outline.is_in_by_out(module) else (b_RO, a_RI)

    def _expert(self, module: str) -> ExpertName:
        """The expert's projection that a Hub module is."""
        expert = self._base.architecture.family.parse_expert(module)
        assert expert is not None, f"{module} belongs to no expert"
        return expert

    def _stack(self, key: str) -> Tensor:
        """Read a layer's stacked B; an expert's values are spread over all of it, so it is kept for the next expert."""
        if key not in self._stacks:
            while len(self._stacks) >= _STACKS_KEPT:
                self._stacks.pop(next(iter(self._stacks)))
            self._stacks[key] = self._entries[key].read(torch.float32)
        return self._stacks[key]
