"""Proof from the files that merged weights are base plus update, by code that is independent of the code that merged.

The idea: read merged folder, base and adapter from disk, recompute the sum in float64, and allow only what rounding
explains. The adapter's file is read by its own keys with safetensors' reader. Memory does not grow with the model.

One value, merged in bfloat16 (8 bits of precision, eps = 2^-7):

    base 1.0,  update 0.0110           exact = 1.0110 (float64)
    written                            1.0078, the nearest bfloat16: off by 0.0032
    allowed                            half a step = eps / 2 * 1.0110 = 0.0039, plus what float32 sums may lose
    error                              0.0032 / 0.0039 = 0.81; more than 1 is refused
    visible?                           update 0.0110 > 2 * allowed = 0.0079, so it was applied once: a missing or a
                                       double update would be off by more than is allowed

What is checked, in this order: names, shapes and dtypes; that each adapter tensor has its place; all untouched tensors
bit by bit; checksums of the touched ones as written; a few rows of each touched tensor; a sample of whole tensors.

Shape letters: X rows and Y columns of a stored weight, n rows that are looked at, R rank.
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

_ROWS = 4  # rows recomputed of every changed weight
_SAMPLE = 12  # changed weights recomputed as a whole, at least
_BLOCK = 1 << 15  # values recomputed at a time, in float64: few enough for a core's cache


@dataclass(frozen=True)
class WeightProof:
    """The findings in the written files. Any other finding is an error.

    Attributes:
        tensors: Number of tensors in the merged folder. Names and shapes are the base's, dtypes the base's or the one
            asked for.
        untouched: Number of tensors that the adapter does not change. Every value is the base's, or its cast or its NF4
            rounding, bit by bit.
        touched: Number of tensors that the adapter changes. Each has the checksum of what was written, and a few rows
            of each were recomputed.
        rows: Number of these rows.
        applied_once: Number of adapter tensors whose update is present once in these rows, not twice and not missing.
        without_update: Weights whose update is zero, for example because no token of that expert was trained on.
        below_rounding: Weights whose update is smaller than the output dtype's rounding in all these rows, so that
            nothing can show it.
        sample: Weights recomputed as a whole, at least one of each kind.
        values: Number of values in the sample.
        largest_error: Largest difference from the recomputed value in rows and sample, as a share of what float32 sums
            and one rounding to the output dtype allow.
        unmerged_exactly: Share of the sample's values for which `merged - update`, rounded to the output dtype, is
            bit-equal to the base.
        largest_unmerge_error: Largest difference of `merged - update` from the base, as a share of what two roundings
            allow.
        seed: Seed for the choice of rows and sample.
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
        stored: The adapter, as files.
        folder: The merged folder.
        dtype: The dtype that was asked for; None for each tensor's own.
        checksums: CRC-32 of each changed tensor's bytes, as written.
        seed: Seed for the choice of rows and sample.

    Raises:
        CheckpointError: If a tensor is not what base and adapter give; the message names file and tensor.
    """
    # 1. Names and shapes (checked when the folder is opened), and dtypes
    merged = {entry.name: entry for entry in BaseCheckpoint.open(folder).copied}
    wrong = [entry for entry in merged.values() if entry.dtype != (dtype or base.entries[entry.name].dtype)]
    if wrong:
        raise CheckpointError(f"{wrong[0].file}: tensor '{wrong[0].name}' is {wrong[0].kind}, not the dtype asked for.")
    adapter = _AdapterFile(stored, base)
    # 2. Each tensor of the adapter changes some weight
    touched = [name for name in base.entries if adapter.keys_of(name)]
    _check_all_used(adapter, touched)
    # 3. Untouched tensors bit by bit, and the checksums of touched ones
    untouched = [name for name in base.entries if name not in set(touched)]
    _check_bytes(base, merged, untouched, checksums)
    # 4. A few rows of each touched tensor
    choice, checks, found = random.Random(seed), dict[str, _Found](), list[_Found]()
    with shown_progress("Recomputing weights", len(touched), "tensors") as advance:
        for name in touched:
            checks[name] = _check_rows(base, adapter, merged[name], choice)
            advance(1)
    # 5. A sample of whole tensors
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
    """The findings in some rows of a weight.

    Attributes:
        error: Largest difference from the recomputed value, as a share of the limit.
        visible: True if a missing or double update would exceed the limit somewhere.
        without_update: True if the whole weight's update is zero, or a fully trained weight did not change in these
            rows.
        unmerge_error: Largest difference of `merged - update` from the base, as a share of the limit.
        restored: Number of values for which `merged - update` is bit-equal to the base.
    """

    error: float
    visible: bool
    without_update: bool
    unmerge_error: float
    restored: int


@dataclass(frozen=True)
class _Factors:
    """LoRA's factors for the stored weight (X, Y), float64: the update is (b @ a)^T.

    Attributes:
        a: (R, X).
        b: (Y, R), scaled.
        abs_a, abs_b: Their absolute values, from which the rounding of sums is estimated.
        factor: DoRA's factor of weight plus update: (1, Y) if outputs are columns, (X, 1) if they are rows; None
            without DoRA.
    """

    a: Tensor
    b: Tensor
    abs_a: Tensor
    abs_b: Tensor
    factor: Tensor | None

    @property
    def are_zero(self) -> bool:
        """True if there is no update at all. DoRA's factor counts as an update."""
        return self.factor is None and not (self.a.any() and self.b.any())

    def update(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return some rows of the update (n, Y), and for each value the sum of the absolute values of its R terms."""
        # (b (Y, R) @ a[:, rows] (R, n)).T
        return (self.b @ self.a[:, rows]).T, (self.abs_b @ self.abs_a[:, rows]).T

    def factor_of(self, rows: list[int]) -> Tensor | None:
        """Return DoRA's factor for these rows, (1, Y) or (n, 1); None without DoRA."""
        return self.factor if self.factor is None or len(self.factor) == 1 else self.factor[rows]


class _AdapterFile:
    """The adapter's file, read by its own keys. Factors are float64; an expert's are sliced from its layer's stack."""

    def __init__(self, stored: StoredAdapter, base: MergeBase) -> None:
        self.stored = stored
        self._base = base
        self._family = base.architecture.family
        self._num_experts = base.architecture.num_experts
        self._scaling = stored.outline(base.architecture).scaling
        self._experts_of = json.loads(stored.metadata.get("lola_ft_experts", "{}"))
        self._latest: tuple[str, _Factors] | None = None

    def keys_of(self, name: str) -> list[str]:
        """List the keys of the file's tensors that change this weight: LoRA's A and B (and DoRA's lengths), or one."""
        found = expert_of(name.rpartition(".")[0], self._family)
        if found and found[1] not in self._experts_of.get(found[0], (found[1],)):
            return []  # the stack has a place for this expert, but the adapter does not train it
        return factor_keys(name, self.stored.entries, self.stored.config, self._family)

    def factors(self, name: str) -> _Factors:
        """Return the factors of a weight. The latest weight's are kept."""
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, self._read_factors(name))
        return self._latest[1]

    def _read_factors(self, name: str) -> _Factors:
        # As in the file: A (R, in) and B (out, R); of a layer's E experts A (E * R, in) and B (out, R * E)
        key_a, key_b, *key_lengths = self.keys_of(name)
        with safe_open(self.stored.folder / WEIGHTS_FILE, framework="pt") as file:
            a, b = file.get_tensor(key_a), file.get_tensor(key_b)
            lengths = file.get_tensor(key_lengths[0]) if key_lengths else None
        module, in_by_out = name.removesuffix(".weight"), self._base.architecture.places[name].in_by_out
        if (found := expert_of(module, self._family)) and not re.search(r"\.experts\.\d+\.", key_a):
            # Expert e has rows e*R to (e+1)*R of A, but columns e, e+E, e+2E … of B.
            expert, rank = found[1], a.shape[0] // self._num_experts
            a, b = a[expert * rank : (expert + 1) * rank], b[:, expert :: self._num_experts]
            outputs = self._base.entries[name].shape[1 if in_by_out else 0]
            first = outputs * place_in_stack(module, self._family)
            b = b[first : first + outputs]  # gate and up share a stack: gate's outputs come first, then up's
        # Stored in×out: (b @ a)^T is in×out, (X, Y) = (in, out). Stored out×in: the roles of a and b are swapped.
        if not in_by_out:
            a, b = b.T, a.T
        scaled = self._scaling(module) * b.double()
        factors = _Factors(a.double(), scaled, a.double().abs(), scaled.abs(), None)
        if lengths is None:
            return factors
        # DoRA: learned length / length of weight plus update, one per output
        factor = lengths.double() / self._lengths(name, factors, in_by_out)
        return replace(factors, factor=factor[None] if in_by_out else factor[:, None])

    def _lengths(self, name: str, factors: _Factors, in_by_out: bool) -> Tensor:
        """Return the length (norm) of each output of weight plus update: of its columns (in×out) or rows (out×in)."""
        columns, found = len(factors.b), []
        for start, values in self._base.pieces(self._base.entries[name], unit=columns):
            rows = list(range(start // columns, (start + values.numel()) // columns))
            squares = (values.view(-1, columns).double() + factors.update(rows)[0]).square()
            found.append(squares.sum(0) if in_by_out else squares.sum(1))
        return (torch.stack(found).sum(0) if in_by_out else torch.cat(found)).sqrt()

    def token_rows(self, name: str) -> dict[int, Tensor]:
        """Read the trained rows of an embedding, by token id; an empty dict for any other weight."""
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
    """Check that untouched tensors are the base's, and that touched ones are on disk as they were written."""
    untouched_names = set(untouched)
    with shown_progress("Checking the files", len(base.entries), "tensors") as advance:
        for name in base.entries:
            if name in untouched_names:
                _check_untouched(base, base.entries[name], merged[name])
            else:
                _check_stored(merged[name], checksums[name])
            advance(1)


def _check_stored(entry: TensorEntry, checksum: int) -> None:
    """Check that the file holds the bytes that were written, by their CRC-32."""
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
    """Check every value of a changed weight, some rows at a time; findings are those of all rows together."""
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
    """Compare written rows with base plus update in float64, and subtract the update again.

    Args:
        start: The base's rows (n, Y).
        written: The merged rows (n, Y).
        rows: Their numbers.

    Raises:
        CheckpointError: If a difference is larger than rounding allows.
    """
    if len(adapter.keys_of(merged.name)) == 1:
        return _compare_trained(adapter, merged, start, written, rows)
    # exact (n, Y) = base + update, or with DoRA factor * (base + update)
    factors = adapter.factors(merged.name)
    update, sizes = factors.update(rows)
    exact = start.double() + update
    # float32 sums of R products and one addition lose at most this, in proportion to the sizes of what is added.
    lost = (len(factors.a) + 4) * 2.0**-24 * (start.double().abs() + sizes)
    if (factor := factors.factor_of(rows)) is not None:
        exact = exact * factor
        update = exact - start.double()
        # Scaling each output, and subtracting and adding the base, lose a little more.
        lost = lost * factor.abs() + 2.0**-22 * (exact.abs() + start.double().abs())
    # One rounding to the output dtype comes on top. error is the largest difference as a share of what is allowed.
    allowed = _half_step(exact, written.dtype) + lost
    error = ((written.double() - exact).abs() / allowed).nan_to_num(nan=torch.inf).max().item()
    if error > 1:
        raise CheckpointError(
            f"{merged.file}: tensor '{merged.name}' is not base plus update: rows {rows[0]} to {rows[-1]} hold a value "
            f"{error:.3g} times as far off as rounding allows. The merge or the disk is faulty. Nothing was kept."
        )
    # Unmerge: written - update must be the base, but for two roundings (merging and unmerging).
    back = (written.float() - update.float()).to(written.dtype)
    twice = allowed + _half_step(start.double(), written.dtype) + 2.0**-23 * exact.abs()
    unmerge = ((back.double() - start.double()).abs() / twice).max().item()
    if unmerge > 1:
        raise CheckpointError(f"{merged.file}: tensor '{merged.name}' minus its update does not give the base back.")
    # A missing or a double update is off by |update|: certain to exceed the limit if it is larger than twice that.
    visible = bool((update.abs() > 2 * allowed).any())
    return _Found(error, visible, factors.are_zero, unmerge, int((back == start.to(back.dtype)).sum()))


def _compare_trained(
    adapter: _AdapterFile, merged: TensorEntry, start: Tensor, written: Tensor, rows: list[int]
) -> _Found:
    """Check that a fully trained weight, or trained token rows, replace the base's values, bit by bit.

    There is no sum to invert: without the adapter the value is the base's, so that unmerging is exact.
    """
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
    """Return an upper bound of half the distance between neighbouring numbers of a dtype at these values; float64."""
    info = torch.finfo(dtype)
    return info.eps / 2 * values.abs() + info.smallest_normal * info.eps


def _row_choice(entry: TensorEntry, choice: random.Random) -> list[int]:
    """Choose up to `_ROWS` rows of a tensor, in order."""
    return sorted(choice.sample(range(entry.shape[0]), min(_ROWS, entry.shape[0])))


def _choose_sample(touched: list[str], choice: random.Random) -> list[str]:
    """Choose at least one weight of each kind (names that differ only in numbers), and more up to `_SAMPLE`."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in touched:
        kinds[re.sub(r"\.\d+\.", ".N.", name)].append(name)
    chosen = [choice.choice(names) for names in kinds.values()]
    rest = [name for name in touched if name not in chosen]
    return chosen + choice.sample(rest, min(len(rest), max(0, _SAMPLE - len(chosen))))


def _stretch(entry: TensorEntry, start: int, numel: int) -> Tensor:
    """Read `numel` values of a tensor, flat, from place `start` on."""
    size = entry.dtype.itemsize
    return replace(entry, shape=(numel,), start=entry.start + start * size, num_bytes=numel * size).read()
