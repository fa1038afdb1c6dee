"""The adapter's update of each weight, read from its file one weight at a time: an adapter may be larger than memory.

The idea: a merged weight is the base's weight plus `scaling * B @ A`. Base checkpoints store weights as in×out or as
out×in, so the factors are brought to the stored orientation once, and each piece of whole rows gets its own product.
A weight stored as 4 x 6 (in×out), rank R = 2, the piece of rows 2 and 3:

    A (R, in)  = (2, 4),  B^T (R, out) = (2, 6)             rows_RX = A, columns_RY = B^T
    start      = 12                                         row 2 = 12 // 6
    update     = scaling * A[:, 2:4].T (2, 2) @ B^T (2, 6)  (2, 6), as flat as the values it is added to

A weight that is stored out×in swaps them: rows_RX = B^T and columns_RY = A.

The other kinds of change: fully trained weights (no LoRA) and trained token rows replace the base's values. DoRA
multiplies weight plus update by a factor per output. All of them are returned as a difference from the base's values.

Shape suffixes: R rank, X rows and Y columns of the stored weight, I inputs, O outputs of the layer.
"""

import torch
from torch import Tensor

from lola_ft.adapters.on_disk import StoredAdapter
from lola_ft.adapters.stacks import split_b
from lola_ft.families.expert_layout import ExpertName
from lola_ft.merging.merge_base import MergeBase

_STACKS_KEPT = 2  # in the file, experts of a layer's two stacks (into the experts, back out) alternate


class Deltas:
    """An adapter's changes to each weight of a checkpoint, by the weight's Hub name and in its stored orientation.

    The tensors that change the latest weight are kept between calls, because a weight comes in several pieces.

    Attributes:
        outline: The adapter's pairs and trained weights, with shapes only.
    """

    def __init__(self, stored: StoredAdapter, base: MergeBase) -> None:
        self.outline = stored.outline(base.architecture)
        self._base = base
        self._entries = stored.entries
        self._num_experts = base.architecture.num_experts
        self._stacks: dict[str, Tensor] = {}
        self._name = ""  # the weight that the next four belong to; at most one of pair, trained and rows is set
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
        """Return the difference between merged and base values of whole rows of a weight, float32.

        With LoRA this is `scaling * b @ a`, in the stored orientation (arXiv 2106.09685). With DoRA it is
        `factor * (values + scaling * b @ a) - values`, with one factor per output (arXiv 2402.09353).

        Args:
            name: The weight's Hub name.
            start: Place of the first value in the flat weight, at the beginning of a row.
            values: The base's values, flat, whole rows.

        Returns:
            As flat as `values`, in memory that the next call overwrites.
        """
        self._fetch(name)
        if len(self._update) < values.numel():
            self._update = torch.empty(values.numel())
        update = self._update[: values.numel()]
        # Replaced values: the difference from the base's
        if self._rows is not None:
            return torch.sub(self._with_rows(name, start, values), values, out=update)
        if self._trained is not None:
            return torch.sub(self._trained[start : start + values.numel()], values, out=update)
        # LoRA: only the product. DoRA: factor * (values + product) - values, with the factor along outputs, which are
        # columns (Y,) or rows (X, 1) of the piece.
        self._product(name, start, update)
        if self._factor is not None:
            columns = self._base.entries[name].shape[-1]
            factor = self._factor
            if not self.outline.is_in_by_out(name.removesuffix(".weight")):
                factor = factor[start // columns : (start + values.numel()) // columns, None]
            update.add_(values).view(-1, columns).mul_(factor)
            update.sub_(values)
        return update

    def _product(self, name: str, start: int, update: Tensor) -> None:
        """Write `scaling * rows.T @ columns` for whole rows of the stored weight into the flat `update`."""
        assert self._pair is not None, f"{name}: the adapter does not change it"
        # update (X, Y) = scaling * rows[:, these rows].T (X, R) @ columns (R, Y)
        rows_RX, columns_RY = self._pair
        update_XY = update.view(-1, columns_RY.shape[1])
        row = start // columns_RY.shape[1]
        part_XR = rows_RX[:, row : row + len(update_XY)].t()
        scaling = self.outline.scaling(name.removesuffix(".weight"))
        torch.addmm(update_XY, part_XR, columns_RY, beta=0, alpha=scaling, out=update_XY)

    def trained(self, name: str, start: int, values: Tensor) -> Tensor | None:
        """Return the values that replace the base's, flat float32, if weight or rows were fully trained; else None."""
        self._fetch(name)
        if self._rows is not None:
            return self._with_rows(name, start, values)
        return None if self._trained is None else self._trained[start : start + values.numel()]

    def _fetch(self, name: str) -> None:
        """Read the adapter's tensors that change this weight, in float32, unless they were read last time."""
        if name == self._name:
            return
        self._pair = self._trained = self._factor = self._rows = None
        if name in self.outline.trained:
            (key,) = self.outline.keys[name]
            entry = self._entries[key]
            if name.endswith(".bias") and len(entry.shape) == 2:  # a layer's stack, one row per expert
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
        """Return whole rows of an embedding (flat from `start` on, float32) with the trained tokens' rows inserted."""
        assert self._rows is not None, f"{name}: no rows of it are trained"
        columns = self._base.entries[name].shape[-1]
        changed = values.float().view(-1, columns).clone()
        for place, token in enumerate(self.outline.token_ids):
            row = token - start // columns
            if 0 <= row < len(changed):
                changed[row] = self._rows[place]
        return changed.view(-1)

    def _dora_factor(self, name: str) -> Tensor:
        """Return DoRA's factor of each output, float32 (O,): learned length / length of weight plus update.

        An output's length is the norm of its column (in×out) or row (out×in), summed in float64 piece by piece.
        """
        entry, module = self._base.entries[name], name.removesuffix(".weight")
        columns, by_column = entry.shape[-1], self.outline.is_in_by_out(module)
        squares = torch.zeros(columns if by_column else entry.shape[0], dtype=torch.float64)
        for start, values in self._base.pieces(entry, columns):
            # Squares of weight plus update (X, Y), summed over inputs
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
        """Read the factors (R, X) and (R, Y) of the stored weight: A and B^T if it is in×out, B^T and A if out×in.

        PEFT stores the factors of a layer's experts in stacks: A as (E * R, I), expert by expert; B as (O, R * E) with
        the columns of experts alternating. An expert's factors are cut out of them.
        """
        key_a, key_b = self.outline.keys[module][:2]
        entry_a, entry_b = self._entries[key_a], self._entries[key_b]
        rank = self.outline.pairs[module].rank
        # The weight's own pair: A (R, I), B (O, R)
        if entry_a.shape[0] == rank:
            a_RI, b_RO = entry_a.read(torch.float32), entry_b.read(torch.float32).t().contiguous()
        # An expert's, from stacks. With gate and up in one projection, B's outputs are gate's, then up's.
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
        """Return the expert and projection that a Hub module names."""
        expert = self._base.architecture.family.parse_expert(module)
        assert expert is not None, f"{module} belongs to no expert"
        return expert

    def _stack(self, key: str) -> Tensor:
        """Read a layer's stacked B. Each expert has values all over the stack, so it is kept for the next one."""
        if key not in self._stacks:
            while len(self._stacks) >= _STACKS_KEPT:
                self._stacks.pop(next(iter(self._stacks)))
            self._stacks[key] = self._entries[key].read(torch.float32)
        return self._stacks[key]
