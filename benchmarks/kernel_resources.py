"""Registers, spills and shared memory of every Triton kernel on every chip: `python benchmarks/kernel_resources.py`.

Needs no GPU: each variant is compiled as a launch on that chip would compile it, and the figures are read from the
compiler's output with the cuobjdump in Triton's package. Prints a table, and one JSON line last. `--chips 8.6 9.0`
chooses chips. `--all` compiles every combination, instead of a set in which all pairs of values of two settings occur.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported, which would interpret

import torch
import triton
from kernel_variants import TILES, Variant, all_variants, variants
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lola_ft.kernels import nf4_triton
from lola_ft.kernels.grouping import Grouping
from lola_ft.kernels.launch_settings import SHARED_BYTES, launches_of
from lola_ft.kernels.nf4_sizes import packed_sizes
from lola_ft.kernels.products import Side
from lola_ft.kernels.stacks import NF4Stack, WeightStack
from lola_ft.kernels.triton_products import TritonProducts

Capability = tuple[int, int]
CHIPS = tuple(SHARED_BYTES)
REGISTERS = 65_536  # of a block's threads together, on every chip
_HIDDEN, _INNER, _EXPERTS, _ROWS = 2048, 1024, 16, 4096
_MATRIX = ("wgmma.mma", "mma.sync", "tcgen05.mma")
_OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel's figures: `registers` and `spills` (bytes) per thread, `shared` (bytes) per block."""

    chip: str
    dtype: str
    kernel: str
    variant: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    warps: int

    def faults(self, capability: Capability) -> list[str]:
        """Return the reasons why the kernel does not fit the chip."""
        most, threads = SHARED_BYTES[capability], 32 * self.warps
        found = {
            f"spills {self.spills} bytes": self.spills > 0,
            f"needs {self.shared} of {most} bytes of shared memory": self.shared > most,
            f"needs {self.registers} registers for each of {threads} threads": self.registers * threads > REGISTERS,
            "has no matrix instruction": self.matrix_instructions == 0 and self.dtype == "bfloat16",
        }
        return [fault for fault, holds in found.items() if holds]


def compile_variant(variant: Variant, capability: Capability, dtype: torch.dtype) -> Iterator[Compiled]:
    """Yield the compiled kernels of a variant: the product and, with LoRA, the two kernels of its factors.

    Yields nothing if the kernels are not used for this chip, dtype and tile.
    """
    if launches_of(capability, dtype, variant.tile) is None:
        return
    for compiled in launched(capability, lambda: _launch(variant, capability, dtype)):
        text = compiled.asm["ptx"]
        registers, spills = _resources(compiled.asm["cubin"])
        yield Compiled(
            ".".join(map(str, capability)),
            str(dtype).removeprefix("torch."),
            compiled.metadata.name,
            str(variant),
            registers,
            spills,
            compiled.metadata.shared,
            sum(text.count(name) for name in _MATRIX),
            compiled.metadata.num_warps,
        )


def launched(capability: Capability, launch: Callable[[], None]) -> list[Any]:
    """Compile the kernels that `launch` would launch on a chip, without launching them, and return them."""
    compiled: list[Any] = []
    kernels = {name: getattr(nf4_triton, name) for name in ("product", "to_rank", "outer")}
    driver.set_active(_Chip(capability))
    try:
        for name, kernel in kernels.items():
            setattr(nf4_triton, name, _Compiler(kernel, compiled))
        launch()
    finally:
        for name, kernel in kernels.items():
            setattr(nf4_triton, name, kernel)
    return compiled


@dataclass(frozen=True)
class _Chip:
    """A driver for a chip, with the methods that Triton calls when it compiles."""

    capability: Capability

    def get_current_device(self) -> int:
        return 10 * self.capability[0] + self.capability[1]  # Triton caches compiled kernels by device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.get_current_device(), 32)


@dataclass(frozen=True)
class _Compiler:
    """A stand-in for a kernel: `kernel[grid](…)` only compiles it for these arguments."""

    kernel: Any
    compiled: list[Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))


def _launch(variant: Variant, capability: Capability, dtype: torch.dtype) -> None:
    """Multiply tensors without memory, of a real model's size."""
    products, parts = TritonProducts(capability=capability), 1 + variant.gated
    weight = _weight(parts, variant.in_by_out, variant.forward and variant.extra, dtype)
    groups = _groups(variant.tile)
    size_in, size_out = weight.in_features, weight.out_features
    if not variant.forward:
        size_in, size_out = size_out, size_in
    x = _empty(_ROWS, size_in, dtype=dtype)
    side = None
    if variant.rank:
        factor = _empty(_EXPERTS, variant.rank, size_out, dtype=dtype).transpose(1, 2)
        if variant.forward:
            factor = _empty(_EXPERTS, size_out, variant.rank, dtype=dtype)
        keep = _empty(_ROWS, size_out, dtype=torch.bool) if variant.extra and not variant.forward else None
        side = Side(_empty(_ROWS, variant.rank, dtype=dtype), factor, keep, 1.1)
    (products.times if variant.forward else products.times_transposed)(x, weight, groups, side)
    if variant.rank:
        products.to_rank(x, _empty(_EXPERTS, variant.rank, size_in, dtype=dtype), groups)
        products.outer(_empty(_ROWS, variant.rank, dtype=dtype), x, groups)


def _weight(parts: int, in_by_out: bool, has_bias: bool, dtype: torch.dtype) -> WeightStack:
    packed, blocks, superblocks = packed_sizes(_HIDDEN * _INNER)
    matrices, float32 = _EXPERTS * parts, torch.float32
    nf4 = NF4Stack(
        _empty(matrices, packed),
        _empty(matrices, blocks),
        _empty(matrices, superblocks, dtype=float32),
        _empty(matrices, dtype=float32),
        _empty(256, dtype=float32),
        _empty(16, dtype=float32),
        (_HIDDEN, _INNER) if in_by_out else (_INNER, _HIDDEN),
        parts,
    )
    bias = _empty(_EXPERTS, parts * _INNER, dtype=dtype) if has_bias else None
    nothing: Any = None
    return WeightStack(_HIDDEN, parts * _INNER, in_by_out, None, bias, nothing, nothing, nf4)


def _groups(tile: int) -> Grouping:
    of_experts, rows = _empty(_EXPERTS, dtype=torch.int32), _empty(_ROWS, dtype=torch.int64)
    return Grouping(rows, rows, of_experts, of_experts, _empty(_ROWS // tile, dtype=torch.int32), _ROWS, tile)


def _empty(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return a thread's registers, and the bytes of its stack, where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([_OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, f"cuobjdump printed no registers: {said}"
    return int(found[1]), int(found[2])


def dtypes_of(capability: Capability) -> tuple[torch.dtype, ...]:
    """Return the dtypes to compile for on a chip: bfloat16, or float16 if the chip has no bfloat16; and float32."""
    return torch.float16 if capability < (8, 0) else torch.bfloat16, torch.float32


def main() -> None:
    args = parse()
    table = Table(title="Each kernel's largest needs, over its variants", title_justify="left")
    headings = ("chip", "dtype", "kernel", "variants", "registers", "spills", "shared KB", "of KB", "not used at")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:3] else "right")
    faults, rows = [], []
    for capability in args.chips:
        for dtype in dtypes_of(capability):
            found = [
                one
                for variant in (all_variants() if args.all else variants())
                for one in compile_variant(variant, capability, dtype)
            ]
            faults += [
                f"{one.chip} {one.dtype} {one.kernel}, {one.variant}: {fault}"
                for one in found
                for fault in one.faults(capability)
            ]
            unused = [str(tile) for tile in TILES if launches_of(capability, dtype, tile) is None]
            for kernel in ("product", "to_rank", "outer"):
                own = [one for one in found if one.kernel == kernel]
                row = {
                    "chip": ".".join(map(str, capability)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": kernel,
                    "variants": len(own),
                    "registers": max((one.registers for one in own), default=0),
                    "spills": max((one.spills for one in own), default=0),
                    "shared_kb": max((one.shared for one in own), default=0) // 1024,
                    "of_kb": SHARED_BYTES[capability] // 1024,
                    "unused_tiles": unused,
                }
                rows.append(row)
                table.add_row(*(", ".join(value) if isinstance(value, list) else str(value) for value in row.values()))
    Console(width=120).print(table)
    for fault in faults:
        print(fault)
    print(json.dumps({"kernels": rows, "faults": faults}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", type=_capability, default=list(CHIPS), help="compute capabilities")
    parser.add_argument("--all", action="store_true", help="every combination: an hour")
    return parser.parse_args()


def _capability(text: str) -> Capability:
    major, minor = map(int, text.split("."))
    if (major, minor) not in CHIPS:
        raise argparse.ArgumentTypeError(f"known are {', '.join('.'.join(map(str, chip)) for chip in CHIPS)}")
    return major, minor


if __name__ == "__main__":
    main()
