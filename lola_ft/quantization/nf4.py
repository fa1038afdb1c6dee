"""NF4 with double quantisation (QLoRA, arXiv 2305.14314), for one weight at a time; bit-equal to bitsandbytes.

The idea: a weight is cut into blocks of 64 values in memory order. A block is divided by its largest absolute value
(its scale, absmax), and each value is replaced by the number of the nearest of 16 fixed values between -1 and 1. The
first four values of a block whose largest is -2.0:

    values        0.5     -2.0      1.0     0.1
    / scale 2.0   0.25    -1.0      0.5     0.05        the block's scale is 2.0
    nearest NF4   0.2461  -1.0      0.4407  0.0796      NF4's values number 10, 0, 12 and 8
    packed bytes  0xA0              0xC8                two codes per byte, the first in the high four bits
    dequantised   0.4922  -2.0      0.8814  0.1592      = NF4's value * scale

Double quantisation: scales are stored in 8 bits, too. Their mean (`offset`) is subtracted, and blocks of 256 scales
have a float32 scale of their own (`absmax2`). In all, 4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight.

Letters in shapes: n values of a weight, c values of a chunk of it, M matrices of a stack. The lengths n/2 (bytes), n/64
(blocks) and n/64/256 (blocks of scales) are rounded up.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import bitsandbytes.functional as bnb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels.nf4_sizes import ABSMAX_BLOCK, BLOCK
from lola_ft.kernels.stacks import NF4Stack
from lola_ft.kernels.tiles import Tiles

# Values quantised at a time: few enough for a core's cache, enough that threads seldom wait for the interpreter.
_CHUNK = 4096 * BLOCK
_SQUARE = 64  # values along a side of the squares in which a transposed weight is copied
_TILE = 1 << 20  # values dequantised at a time on a CPU: 4 MB in float32
Values = Callable[[slice], np.ndarray]  # returns a chunk of a weight's values
_SMALLEST_SCALE = np.float32(1e-38)  # divisor of a block of zeros


@dataclass(frozen=True)
class NF4:
    """One quantised weight.

    Attributes:
        packed: Two 4-bit codes per byte, uint8 (numel / 2, rounded up).
        absmax: 8-bit code of each block's scale, uint8 (blocks,).
        absmax2: Scale of each block of scales, float32 (blocks / 256, rounded up).
        offset: Mean of the scales, float32 scalar; not finite if a value of a weight quantised on a CPU is not.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    offset: Tensor


def quantize(weight: Tensor, out: NF4 | None = None) -> NF4:
    """Quantise a float weight of any shape, in memory order; bit-equal to bitsandbytes' `quantize_4bit`.

    Args:
        out: Tensors to write into; new ones if left out.
    """
    # 1. Codes, two per byte (n/2,), and the float32 scale of each block (n/64,)
    if weight.device.type == "cpu":
        packed = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8) if out is None else out.packed
        scales = _fill_codes(weight.detach(), packed)
    else:
        flat = weight.contiguous().view(-1)
        packed, scales = torch.ops.bitsandbytes.quantize_4bit.default(flat, BLOCK, "nf4", torch.uint8)
    # 2. Scales around their mean, in 8 bits: codes (n/64,) and a float32 scale for each 256 of them
    offset = scales.mean()
    absmax, state = bnb.quantize_blockwise(scales.sub_(offset), blocksize=ABSMAX_BLOCK)
    new = NF4(packed.view(-1), absmax, state.absmax, offset)
    if out is None:
        return new
    for name in ("packed", "absmax", "absmax2", "offset"):
        if (target := getattr(out, name)).data_ptr() != (source := getattr(new, name)).data_ptr():
            target.copy_(source)
    return out


def _fill_codes(weight: Tensor, packed: Tensor) -> Tensor:
    """Fill `packed` (n/2,) with the codes of a CPU weight in memory order, and return its float32 block scales (n/64,).

    A code is the number of bounds (midpoints between neighbouring NF4 values) below the scaled value. This gives the
    codes of bitsandbytes' CPU operator (0.50) in a fraction of its time and memory: the operator spends three quarters
    of its time in `bucketize`, and needs ten bytes per weight besides the result.

    Threads use numpy, for two reasons. Its comparison writes bytes three times faster than torch's. And each thread
    that calls torch leaves a pool of OpenMP threads behind. After that, every operation of the process has to wake its
    own threads first: a tenth of a millisecond each time, a fifth of a training step in all.
    """
    numel = weight.numel()
    scales = torch.empty(-(-numel // BLOCK), dtype=torch.float32)
    # A chunk per task: its values fit a core's cache. A transposed matrix is cut into whole rows.
    columns = weight.shape[-1] if weight.ndim else 1
    if weight.ndim == 2 and not weight.is_contiguous() and weight.t().is_contiguous() and columns % BLOCK == 0:
        step, whole = max(1, _CHUNK // columns) * columns, numel
        values: Values = partial(_transposed_rows, _as_numpy(weight.t()), columns)
    else:
        flat = weight.contiguous().view(-1)
        step, whole = _CHUNK, numel - numel % BLOCK
        values = _as_numpy(flat).__getitem__
    codes, absmax = packed.numpy(), scales.numpy()
    chunks = [slice(start, min(start + step, whole)) for start in range(0, whole, step)]
    threads = _threads(torch.get_num_threads())
    list(threads.map(lambda chunk: _quantize_chunk(values(chunk), chunk, codes, absmax), chunks))
    # The last block, if it is not full: bitsandbytes' own operator
    if whole < numel:
        tail, tail_scale = torch.ops.bitsandbytes.quantize_4bit.default(flat[whole:], BLOCK, "nf4", torch.uint8)
        packed[whole // 2 :], scales[whole // BLOCK :] = tail.view(-1), tail_scale
    return scales


def _transposed_rows(stored: np.ndarray, columns: int, chunk: slice) -> np.ndarray:
    """Return some whole rows of a matrix that is stored transposed, one after another: (c,).

    They are copied in squares, because reading down a column of the whole matrix would miss the cache with each value.

    Args:
        stored: The matrix in memory order (columns, rows).
        chunk: First and last value, counted along the rows.
    """
    part = np.ascontiguousarray(stored[:, chunk.start // columns : chunk.stop // columns])
    rows = np.empty(part.shape[::-1], part.dtype)
    for start in range(0, columns, _SQUARE):
        rows[:, start : start + _SQUARE] = part[start : start + _SQUARE].T
    return rows.reshape(-1)


def _as_numpy(flat: Tensor) -> np.ndarray:
    """View a tensor's memory in numpy. numpy has no bfloat16: it becomes uint16, the upper half of a float32."""
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def _quantize_chunk(values: np.ndarray, chunk: slice, packed: np.ndarray, scales: np.ndarray) -> None:
    """Fill a chunk's codes and scales from its values (c,), with numpy only."""
    # The values in float32, (c,); bfloat16 becomes float32 by 16 zero bits below
    if values.dtype == np.uint16:
        bits = values.astype(np.uint32)
        scaled = np.left_shift(bits, 16, out=bits).view(np.float32)
    else:
        scaled = values.astype(np.float32)  # a copy in every case
    # Scale of each block (c/64,), and the values divided by it in place: `blocks` (c/64, 64) is a view of `scaled`
    blocks = scaled.reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    with np.errstate(invalid="ignore"):  # a value that is not finite shows in the scales
        blocks *= (1 / np.maximum(absmax, _SMALLEST_SCALE))[:, None]
    np.clip(scaled, -1, 1, out=scaled)
    # Code of each value (c,) uint8: how many of the 15 bounds it exceeds
    codes = np.zeros(scaled.size, dtype=np.uint8)
    above = np.empty(scaled.size, dtype=np.bool_)
    for bound in _bounds():
        np.greater(scaled, bound, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    # Two codes per byte (c/2,): of a pair read as uint16 the first code is the low byte, and goes to the high four bits
    pairs = codes.view("<u2")
    packed[chunk.start // 2 : chunk.stop // 2] = pairs << 4 | pairs >> 8
    scales[chunk.start // BLOCK : chunk.stop // BLOCK] = absmax


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Return the kept pool of threads. New ones per weight would make the allocator hold many arenas, never freed."""
    return ThreadPoolExecutor(count)


@cache
def _bounds() -> tuple[np.float32, ...]:
    """Return the 15 values halfway between neighbouring codes of NF4."""
    code = bnb.get_4bit_type("nf4", device="cpu")
    return tuple(((code[:-1] + code[1:]) / 2).numpy())


def dequantize(nf4: NF4, absmax_code: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the dense weight of `shape` in `dtype`.

    Args:
        absmax_code: `dynamic_code()` on the weight's device.
    """
    return _dense(nf4.packed, _block_scales(nf4, absmax_code), prod(shape), dtype).view(shape)


def dequantize_stack(stack: NF4Stack, dtype: torch.dtype) -> Tensor:
    """Return all dense matrices (M, rows, columns) of a stack, in one call; bit-equal to dequantising them singly."""
    num_matrices, numel = stack.packed.shape[0], prod(stack.shape)
    scales = stack_scales(stack, list(range(num_matrices)))
    if numel % BLOCK:  # a matrix's last block is not full
        parts = [_dense(stack.packed[m], scales[m], numel, dtype) for m in range(num_matrices)]
        return torch.stack(parts).view(num_matrices, *stack.shape)
    return _dense(stack.packed.view(-1), scales.view(-1), num_matrices * numel, dtype).view(num_matrices, *stack.shape)


def stack_scales(stack: NF4Stack, matrices: list[int]) -> Tensor:
    """Return the block scales of some matrices, float32 (matrices, blocks), in one call."""
    num_blocks = stack.absmax.shape[1]
    absmax, absmax2, offset = stack.absmax, stack.absmax2, stack.offset
    if len(matrices) < absmax.shape[0]:
        absmax, absmax2, offset = absmax[matrices], absmax2[matrices], offset[matrices]
    # Pad each matrix's last superblock, so that superblocks of the flat tensor do not cross matrices.
    if missing := -num_blocks % ABSMAX_BLOCK:
        absmax = F.pad(absmax, (0, missing))
    # (matrices * padded blocks,) -> (matrices, blocks); then each matrix's mean is added back
    scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
        absmax.view(-1), absmax2.view(-1), stack.absmax_code, ABSMAX_BLOCK, torch.float32
    )
    return scales.view(len(matrices), -1)[:, :num_blocks] + offset[:, None]


def dequantized_tiles(nf4: NF4, absmax_code: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tiles:
    """Yield the dense weight of `shape` in `dtype`, some rows at a time; bit-equal to `dequantize`."""
    return tiles_of(nf4.packed, _block_scales(nf4, absmax_code), shape, dtype)


def tiles_of(packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tiles:
    """Yield the dense weight (rows, columns) some rows at a time, from its codes and the scale of each block.

    The weight is cut only where that is faster and sums stay exact enough: in float32 on a CPU. A sum over tiles is
    rounded after each tile, which costs digits in half precision. Elsewhere there is one tile, the whole weight.
    """
    rows, columns = shape
    tiled = packed.device.type == "cpu" and dtype == torch.float32 and columns % BLOCK == 0
    step = max(1, _TILE // columns) if tiled else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first, end = start * columns, stop * columns
        scales_of_rows = scales if step >= rows else scales[first // BLOCK : end // BLOCK]
        packed_rows = packed if step >= rows else packed[first // 2 : end // 2]
        yield start, _dense(packed_rows, scales_of_rows, end - first, dtype).view(stop - start, columns)


def _block_scales(nf4: NF4, absmax_code: Tensor) -> Tensor:
    absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
        nf4.absmax, nf4.absmax2, absmax_code, ABSMAX_BLOCK, torch.float32
    )
    absmax += nf4.offset
    return absmax


def _dense(packed: Tensor, scales: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Dequantise codes to a flat tensor of `numel` values.

    bitsandbytes 0.50's CPU operator splits the rows of the given shape among threads, and is wrong for some shapes
    whose last dimension is not a multiple of 64. So it gets rows of one block each, or a single row.
    """
    shape = (numel // BLOCK, BLOCK) if numel % BLOCK == 0 else (numel,)
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed.view(-1, 1), scales, BLOCK, "nf4", shape, dtype)


def dynamic_code() -> Tensor:
    """Return the 256 values of bitsandbytes' 8-bit type for scales, float32, on the CPU."""
    return bnb.create_dynamic_map()


@cache
def nf4_code(device: torch.device) -> Tensor:
    """Return the 16 values of NF4, float32."""
    return bnb.get_4bit_type("nf4", device=device)


def quant_state(nf4: NF4, shape: torch.Size) -> bnb.QuantState:
    """Return the scales as bitsandbytes' own classes hold them."""
    device = nf4.packed.device
    second = bnb.QuantState(
        absmax=nf4.absmax2, code=dynamic_code().to(device), blocksize=ABSMAX_BLOCK, dtype=torch.float32
    )
    return bnb.QuantState(
        absmax=nf4.absmax,
        shape=shape,
        dtype=torch.float32,
        blocksize=BLOCK,
        code=bnb.get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=nf4.offset,
        state2=second,
    )
