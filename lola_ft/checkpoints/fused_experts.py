"""Tensors that hold all experts of a layer in the file: split into one tensor per expert and projection, and joined.

All code between reading and writing works on single experts' matrices, whatever the file's layout. Splitting moves no
bytes: the parts are entries with other places in the same file.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from lola_ft.checkpoints.safetensors_file import TensorEntry
from lola_ft.families import Family


def taken_apart(entries: Iterable[TensorEntry], family: Family) -> Iterator[TensorEntry]:
    """Yield the entries, with tensors (E, outputs, inputs) of all experts split: per expert gate and up, or down."""
    for entry in entries:
        names = family.experts.fused_in(entry.name) if family.experts else ()
        if not names or len(entry.shape) != 3 or entry.shape[1] % len(names):
            yield entry
            continue
        # Memory order is expert, then projection: part i belongs to expert i // P and projection i % P.
        num_experts, outputs, inputs = entry.shape
        size = entry.num_bytes // (num_experts * len(names))
        for number in range(num_experts * len(names)):
            name = names[number % len(names)].format(expert=number // len(names))
            start, shape = entry.start + number * size, (outputs // len(names), inputs)
            yield replace(entry, name=name, shape=shape, start=start, num_bytes=size)


def put_together(
    entries: Iterable[TensorEntry], stored_name: Callable[[str], str], family: Family
) -> Iterator[TensorEntry]:
    """Yield the tensors under the file's names, with experts joined as the file has them.

    Args:
        entries: The tensors, in the file's order.
        stored_name: Function that returns the file's name of a tensor from its Hub name.
    """
    for name, group in groupby(entries, key=lambda entry: stored_name(entry.name)):
        slices = list(group)
        first = slices[0]
        parts = len(family.experts.fused_in(name)) if family.experts else 0
        if not parts or len(first.shape) != 2:
            yield replace(first, name=name)
            continue
        outputs, inputs = first.shape
        shape = (len(slices) // parts, parts * outputs, inputs)
        yield replace(first, name=name, shape=shape, num_bytes=sum(entry.num_bytes for entry in slices))
