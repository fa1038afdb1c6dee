"""Compile the Triton kernels for an H100 or H200, which needs no GPU, and print one JSON line per kernel."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lola_ft.kernels import nf4_triton

_BF16 = dict.fromkeys(("x", "out", "bias", "hidden", "factor", "left", "right"), "*bf16")
_BYTES = dict.fromkeys(("packed", "absmax"), "*u8")
_FLOAT32 = dict.fromkeys(("absmax2", "offset", "absmax_code", "nf4_code"), "*fp32")
_INT32 = dict.fromkeys(("expert_of_tile", "starts", "ends"), "*i32")
_POINTERS = _BF16 | _BYTES | _FLOAT32 | _INT32 | {"keep": "*i1", "keep_scale": "fp32"}


def compile_kernel(kernel: triton.JITFunction, tile_rows: int, **constants: object) -> None:
    """Compile a kernel with those of the given constants that it has."""
    defaults = {"NUM_EXPERTS": 16, "RANK": 16, "BLOCK_N": 128, "BLOCK_K": 64, "PRECISION": "tf32"}
    constants = defaults | {"PARTS": 1, "SIDE_BY_SIDE": True} | constants
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants["BLOCK_M"] = tile_rows
    signature = {name: "constexpr" if name in constants else _POINTERS.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "tile_rows": tile_rows,
                "transposed": constants.get("TRANSPOSED"),
                "parts": constants.get("PARTS"),
                "matrix_instructions": sum(compiled.asm["ptx"].count(name) for name in ("wgmma.mma", "mma.sync")),
                "shared_bytes": compiled.metadata.shared,
            }
        )
    )


if __name__ == "__main__":
    for rows in (16, 128):
        for transposed in (False, True):
            for parts, side_by_side in ((1, True), (2, True), (2, False)):
                of_weight = {"PARTS": parts, "SIDE_BY_SIDE": side_by_side, "TRANSPOSED": transposed}
                compile_kernel(nf4_triton.product, rows, HAS_BIAS=not transposed, HAS_KEEP=transposed, **of_weight)
        compile_kernel(nf4_triton.to_rank, rows)
        compile_kernel(nf4_triton.outer, rows)
