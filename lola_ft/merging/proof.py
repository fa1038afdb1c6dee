"""Proof from the files: the merged weights compared with base and adapter, by other code than wrote them.

The adapter's file is read here by its own keys with safetensors' reader, one expert cut out of a stack by slicing, and
sums are float64. Memory does not grow with the model.
"""

import json
import random
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lola_ft.adapters.on_disk import WEIGHTS_FILE, StoredAdapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_file import TensorEntry, bytes_of
from lola_ft.console import shown_progress
from lola_ft.errors import CheckpointError
from lola_ft.merging.adapter_keys import expert_of, factor_keys, place_in_stack, stacked_row
from lola_ft.merging.merge_base import MergeBase

_ROWS = 4  # of every changed weight
_SAMPLE = 12  # changed weights recomputed in whole, at least
_BLOCK = 1 << 15  # values recomputed at a time, in float64: what stays in a core's cache


@dataclass(frozen=True)
class WeightProof:
    """The findings in the written files; anything else would have been an error.

    Attributes:
        tensors: In the merged folder; names, shapes and dtypes are the base's (or the dtype asked for).
        untouched: Of these, tensors that the adapter does not change: every value is the base's, its cast or its NF4
            rounding, bit by bit.
        touched: Tensors that it changes: read back, each has the checksum of what was written, and a few rows of each
            were recomputed.
        rows: How many rows that were.
        applied_once: Adapter tensors whose update is there once, not twice and not missing, as these rows show.
        without_update: Weights that the adapter holds but does not change (no token of that expert was trained on,
            say): there is nothing to find.
        below_rounding: Weights whose update is smaller than the output dtype's rounding at all these rows, where
            nothing can show it.
        sample: Weights recomputed in whole: at least one of each kind.
        values: How many values the sample has.
        largest_error: Largest difference from the recomputed value in rows and sample, as a share of what one
            rounding to the output dtype and float32 sums allow.
        unmerged_exactly: Share of the sample's values that `merged - update`, rounded to the output dtype, gives back
            bit-equal.
        largest_unmerge_error: Largest difference from the base after that, as a share of what two roundings allow.
        seed: Of the choice of rows and sample.
    """

    tensors: int
    untouched: int
    touched: int
    rows: int
    applied_once: int
    without_update: list[str]
    below_rounding: list[str]
    sample: list[str]
    values: int
    largest_error: float
    unmerged_exactly: float
    largest_unmerge_error: float
    seed: int


def prove(
    base: MergeBase,
    stored: StoredAdapter,
    folder: Path,
    dtype: torch.dtype | None,
    checksums: dict[str, int],
    seed: int = 0,
) -> WeightProof:
    """Check every tensor of a merged folder.

    Args:
        dtype: The dtype that was asked for; None for each tensor's own.
        checksums: CRC-32 of the tensors as they were written.

    Raises:
        CheckpointError: Naming file and tensor.
    """
    merged = {entry.name: entry for entry in BaseCheckpoint.open(folder).copied}  # checks names and shapes
    wrong = [entry for entry in merged.values() if entry.dtype != (dtype or base.entries[entry.name].dtype)]
    if wrong:
        raise CheckpointError(f"{wrong[0].file}: tensor '{wrong[0].name}' is {wrong[0].kind}, not the dtype asked for.")
    adapter = _AdapterFile(stored, base)
    touched = [name for name in base.entries if adapter.keys_of(name)]
    _check_all_used(adapter, touched)
    untouched = [name for name in base.entries if name not in set(touched)]
    _check_bytes(base, merged, untouched, checksums)
    choice, checks, found = random.Random(seed), dict[str, _Found](), list[_Found]()
    with shown_progress("Recomputing weights", len(touched), "tensors") as advance:
        for name in touched:
            checks[name] = _check_rows(base, adapter, merged[name], choice)
            advance(1)
    sample = _choose_sample(touched, choice)
    with shown_progress("Recomputing whole weights", len(sample), "tensors") as advance:
        for name in sample:
            found.append(_check_whole(base, adapter, merged[name]))
            advance(1)
    values = sum(torch.Size(merged[name].shape).numel() for name in sample)
    return WeightProof(
        tensors=len(merged),
        untouched=len(untouched),
        touched=len(touched),
        rows=sum(min(_ROWS, merged[name].shape[0]) for name in touched),
        applied_once=sum(len(adapter.keys_of(name)) for name in touched if checks[name].visible),
        without_update=[name for name in touched if checks[name].without_update],
        below_rounding=[name for name in touched if not checks[name].visible and not checks[name].without_update],
        sample=sample,
        values=values,
        largest_error=max((check.error for check in (*checks.values(), *found)), default=0.0),
        unmerged_exactly=sum(check.restored for check in found) / max(values, 1),
        largest_unmerge_error=max((check.unmerge_error for check in found), default=0.0),
        seed=seed,
    )


@dataclass(frozen=True)
class _Found:
    """The findings in some rows: errors as shares of the limit, whether the update shows, values given back exactly.

    `without_update`: the whole weight's update is zero, or a fully trained weight did not move in these rows.
    """

    error: float
    visible: bool
    without_update: bool
    unmerge_error: float
    restored: int


@dataclass(frozen=True)
class _Factors:
    """Factors a (R, rows) and b (columns, R) of the stored weight and their absolute values in float64, scaled.

    The update is (b @ a)^T. With DoRA, `factor` multiplies weight plus update: (1, columns) or (rows, 1), as the
    outputs are columns or rows.
    """

    a: Tensor
    b: Tensor
    abs_a: Tensor
    abs_b: Tensor
    factor: Tensor | None

    @property
    def are_zero(self) -> bool:
        """Tell whether there is no update at all; DoRA's lengths are one."""
        return self.factor is None and not (self.a.any() and self.b.any())

    def update(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return some rows of the update, and the sum of the sizes of its terms."""
        return (self.b @ self.a[:, rows]).T, (self.abs_b @ self.abs_a[:, rows]).T

    def factor_of(self, rows: list[int]) -> Tensor | None:
        """Return DoRA's factor for these rows."""
        return self.factor if self.factor is None or len(self.factor) == 1 else self.factor[rows]


class _AdapterFile:
    """The adapter's file by its own keys: `update` is float64, from one expert's slices."""

    def __init__(self, stored: StoredAdapter, base: MergeBase) -> None:
        self.stored = stored
        self._base = base
        self._family = base.architecture.family
        self._num_experts = base.architecture.num_experts
        self._scaling = stored.outline(base.architecture).scaling
        self._experts_of = json.loads(stored.metadata.get("lola_ft_experts", "{}"))
        self._latest: tuple[str, _Factors] | None = None

    def keys_of(self, name: str) -> list[str]:
        """List the file's tensors that change this weight."""
        found = expert_of(name.rpartition(".")[0], self._family)
        if found and found[1] not in self._experts_of.get(found[0], (found[1],)):
            return []  # the stack has a place for it that nothing was trained in
        return factor_keys(name, self.stored.entries, self.stored.config, self._family)

    def factors(self, name: str) -> _Factors:
        """Read the factors of a weight; the latest weight's are kept."""
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, self._read_factors(name))
        return self._latest[1]

    def _read_factors(self, name: str) -> _Factors:
        key_a, key_b, *key_lengths = self.keys_of(name)
        with safe_open(self.stored.folder / WEIGHTS_FILE, framework="pt") as file:
            a, b = file.get_tensor(key_a), file.get_tensor(key_b)
            lengths = file.get_tensor(key_lengths[0]) if key_lengths else None
        module, in_by_out = name.removesuffix(".weight"), self._base.architecture.places[name].in_by_out
        if (found := expert_of(module, self._family)) and not re.search(r"\.experts\.\d+\.", key_a):
            expert, rank = found[1], a.shape[0] // self._num_experts
            a, b = a[expert * rank : (expert + 1) * rank], b[:, expert :: self._num_experts]
            outputs = self._base.entries[name].shape[1 if in_by_out else 0]
            first = outputs * place_in_stack(module, self._family)
            b = b[first : first + outputs]  # of gate and up in one stack: first gate's outputs, then up's
        if not in_by_out:
            a, b = b.T, a.T
        scaled = self._scaling(module) * b.double()
        factors = _Factors(a.double(), scaled, a.double().abs(), scaled.abs(), None)
        if lengths is None:
            return factors
        factor = lengths.double() / self._lengths(name, factors, in_by_out)
        return replace(factors, factor=factor[None] if in_by_out else factor[:, None])

    def _lengths(self, name: str, factors: _Factors, in_by_out: bool) -> Tensor:
        """Return the lengths of the outputs of weight plus update: its columns or its rows."""
        columns, found = len(factors.b), []
        for start, values in self._base.pieces(self._base.entries[name], unit=columns):
            rows = list(range(start // columns, (start + values.numel()) // columns))
            squares = (values.view(-1, columns).double() + factors.update(rows)[0]).square()
            found.append(squares.sum(0) if in_by_out else squares.sum(1))
        return (torch.stack(found).sum(0) if in_by_out else torch.cat(found)).sqrt()

    def token_rows(self, name: str) -> dict[int, Tensor]:
        """Read the rows of an embedding that were trained, by their place; none for another weight."""
        (key,) = self.keys_of(name)
        if not key.endswith(".trainable_tokens_delta"):
            return {}
        given = self.stored.config["trainable_token_indices"]
        ids = given if isinstance(given, list) else next(iter(given.values()))
        with safe_open(self.stored.folder / WEIGHTS_FILE, framework="pt") as file:
            return dict(zip(ids, file.get_tensor(key), strict=True))

    def trained(self, name: str) -> Tensor:
        """Read the fully trained weight."""
        (key,) = self.keys_of(name)
        with safe_open(self.stored.folder / WEIGHTS_FILE, framework="pt") as file:
            row = stacked_row(name, key, self._family)
            return file.get_tensor(key) if row is None else file.get_slice(key)[row]


def _check_all_used(adapter: _AdapterFile, touched: list[str]) -> None:
    uses: dict[str, int] = defaultdict(int)
    for name in touched:
        for key in adapter.keys_of(name):
            uses[key] += 1
    lost = sorted(set(adapter.stored.entries) - set(uses))
    if lost:
        raise CheckpointError(f"{adapter.stored.folder / WEIGHTS_FILE}: tensor '{lost[0]}' has no place in the base.")


def _check_bytes(
    base: MergeBase, merged: dict[str, TensorEntry], untouched: list[str], checksums: dict[str, int]
) -> None:
    """Check that untouched tensors are the base's, and that the others are in the files as they were written."""
    untouched_names = set(untouched)
    with shown_progress("Checking the files", len(base.entries), "tensors") as advance:
        for name in base.entries:
            if name in untouched_names:
                _check_untouched(base, base.entries[name], merged[name])
            else:
                _check_stored(merged[name], checksums[name])
            advance(1)


def _check_stored(entry: TensorEntry, checksum: int) -> None:
    """Check that the file holds what was written."""
    found = 0
    for _, piece in entry.pieces():
        found = zlib.crc32(bytes_of(piece), found)
    if found != checksum:
        raise CheckpointError(
            f"{entry.file}: tensor '{entry.name}' differs from what was written, possibly a fault of the disk. Nothing "
            "was kept. Merge again, to another disk."
        )


def _check_untouched(base: MergeBase, entry: TensorEntry, merged: TensorEntry) -> None:
    """Check that every value is the base's, cast to the output dtype, bit by bit."""
    for start, values in base.pieces(entry):
        written = _stretch(merged, start, values.numel())
        if not torch.equal(values.to(written.dtype).view(torch.uint8), written.view(torch.uint8)):
            raise CheckpointError(
                f"{merged.file}: tensor '{merged.name}' differs from the base's, but the adapter does not change it. "
                "The file was damaged while it was written. Nothing was kept. Merge again."
            )


def _check_rows(base: MergeBase, adapter: _AdapterFile, merged: TensorEntry, choice: random.Random) -> _Found:
    """Check a few rows of a changed weight."""
    wanted = _row_choice(merged, choice)
    if len(adapter.keys_of(merged.name)) == 1:
        wanted = sorted({*wanted, *adapter.token_rows(merged.name)})
    start = base.rows(base.entries[merged.name], wanted)
    written = torch.cat([merged.rows(row, row + 1).read() for row in wanted])
    return _compare(adapter, merged, start, written, wanted)


def _check_whole(base: MergeBase, adapter: _AdapterFile, merged: TensorEntry) -> _Found:
    """Check every value of a changed weight, some rows at a time."""
    if len(adapter.keys_of(merged.name)) == 1 and not adapter.token_rows(merged.name):
        every = list(range(merged.shape[0]))
        return _compare_trained(adapter, merged, base.rows(base.entries[merged.name], every), merged.read(), every)
    columns = merged.shape[1]
    parts = []
    for start, values in base.pieces(base.entries[merged.name], unit=columns):
        row = start // columns
        for part in values.view(-1, columns).split(max(1, _BLOCK // columns)):
            rows = list(range(row, row + len(part)))
            parts.append(_compare(adapter, merged, part, merged.rows(row, row + len(part)).read(), rows))
            row += len(part)
    return _Found(
        max(part.error for part in parts),
        any(part.visible for part in parts),
        parts[0].without_update,
        max(part.unmerge_error for part in parts),
        sum(part.restored for part in parts),
    )


def _compare(adapter: _AdapterFile, merged: TensorEntry, start: Tensor, written: Tensor, rows: list[int]) -> _Found:
    """Compare written rows with `start + scaling * (B @ A)^T` in float64, and take the update off again."""
    if len(adapter.keys_of(merged.name)) == 1:
        return _compare_trained(adapter, merged, start, written, rows)
    factors = adapter.factors(merged.name)
    update, sizes = factors.update(rows)
    exact = start.double() + update
    # What float32 sums of R products and one addition may lose, by the sizes of what is added.
    lost = (len(factors.a) + 4) * 2.0**-24 * (start.double().abs() + sizes)
    if (factor := factors.factor_of(rows)) is not None:
        exact = exact * factor
        update = exact - start.double()
        # Each output is scaled, and the base taken off and put on again.
        lost = lost * factor.abs() + 2.0**-22 * (exact.abs() + start.double().abs())
    allowed = _half_step(exact, written.dtype) + lost
    error = ((written.double() - exact).abs() / allowed).nan_to_num(nan=torch.inf).max().item()
    if error > 1:
        raise CheckpointError(
            f"{merged.file}: tensor '{merged.name}' is not base plus update: rows {rows[0]} to {rows[-1]} hold a value "
            f"{error:.3g} times as far off as rounding allows. The merge or the disk is faulty. Nothing was kept."
        )
    back = (written.float() - update.float()).to(written.dtype)
    twice = allowed + _half_step(start.double(), written.dtype) + 2.0**-23 * exact.abs()
    unmerge = ((back.double() - start.double()).abs() / twice).max().item()
    if unmerge > 1:
        raise CheckpointError(f"{merged.file}: tensor '{merged.name}' minus its update does not give the base back.")
    visible = bool((update.abs() > 2 * allowed).any())
    return _Found(error, visible, factors.are_zero, unmerge, int((back == start.to(back.dtype)).sum()))


def _compare_trained(
    adapter: _AdapterFile, merged: TensorEntry, start: Tensor, written: Tensor, rows: list[int]
) -> _Found:
    """Check that a fully trained weight replaces the base's; to take the update off again is to have the base."""
    if by_place := adapter.token_rows(merged.name):
        trained = torch.stack(
            [by_place[row].float() if row in by_place else own.float() for row, own in zip(rows, start, strict=True)]
        )
    else:
        trained = adapter.trained(merged.name)[rows]
    if not torch.equal(trained.to(written.dtype), written):
        raise CheckpointError(f"{merged.file}: tensor '{merged.name}' is not the adapter's trained weight.")
    visible = not torch.equal(written, start.to(written.dtype))
    return _Found(0.0, visible, torch.equal(trained.float(), start.float()), 0.0, start.numel())


def _half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return at most half the distance between neighbouring numbers of a dtype, at these values; float64."""
    info = torch.finfo(dtype)
    return info.eps / 2 * values.abs() + info.smallest_normal * info.eps


def _row_choice(entry: TensorEntry, choice: random.Random) -> list[int]:
    return sorted(choice.sample(range(entry.shape[0]), min(_ROWS, entry.shape[0])))


def _choose_sample(touched: list[str], choice: random.Random) -> list[str]:
    """Choose at least one weight of each kind (attention's, an expert's …), and some more."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in touched:
        kinds[re.sub(r"\.\d+\.", ".N.", name)].append(name)
    chosen = [choice.choice(names) for names in kinds.values()]
    rest = [name for name in touched if name not in chosen]
    return chosen + choice.sample(rest, min(len(rest), max(0, _SAMPLE - len(chosen))))


def _stretch(entry: TensorEntry, start: int, numel: int) -> Tensor:
    """Read some values of a flat tensor."""
    size = entry.dtype.itemsize
    return replace(entry, shape=(numel,), start=entry.start + start * size, num_bytes=numel * size).read()
