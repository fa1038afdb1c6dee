"""Triton kernels for grouped rows: products with 4-bit weights that are decoded inside the K loop, and their LoRA.

A program computes one tile of the output: `BLOCK_M` rows, which belong to one expert, times `BLOCK_N` columns. Weights
are decoded to the values that dequantising them whole gives, bit for bit. Sums are float32.

All of it runs under Triton's interpreter on a CPU (TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # weights that share a scale
_PAIRS = tl.constexpr(32)  # bytes of a block: two codes each
_SUPERBLOCK = tl.constexpr(256)  # scales that share a scale


@triton.jit
def _decoded(
    packed,
    absmax,
    absmax2,
    offset,
    absmax_code,
    nf4_code,
    first_row,
    first_column,
    num_rows,
    num_columns,
    superblocks,
    PARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile (ROWS, COLUMNS) of one expert's weight in float32, zeros outside; COLUMNS is a multiple of BLOCK.

    The weight's parts lie one below another or side by side, and one after another in memory; each has scales of its
    own, `superblocks` blocks of them, and a mean of these.
    """
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column // BLOCK + tl.arange(0, COLUMNS // BLOCK)  # of blocks
    row, column = rows[:, None], columns[None, :]
    blocks_a_row = num_columns // BLOCK
    inside = (row < num_rows) & (column < blocks_a_row)
    if PARTS == 1:
        block = row * blocks_a_row + column
        superblock = block // _SUPERBLOCK
        mean = tl.load(offset)
    else:
        if SIDE_BY_SIDE:
            blocks_a_row = blocks_a_row // PARTS
            part = column // blocks_a_row + row * 0
            part_rows = num_rows
            block = row * blocks_a_row + column % blocks_a_row
        else:
            part_rows = num_rows // PARTS
            part = row // part_rows + column * 0
            block = (row % part_rows) * blocks_a_row + column
        superblock = part * superblocks + block // _SUPERBLOCK
        mean = tl.load(offset + part, mask=inside, other=0.0)
        block += part * part_rows * blocks_a_row
    code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax_code + code) * tl.load(absmax2 + superblock, mask=inside, other=0.0) + mean
    scale = tl.where(inside, scale, 0.0)[:, :, None]
    at = block[:, :, None] * _PAIRS + tl.arange(0, _PAIRS)[None, None, :]
    byte = tl.load(packed + at, mask=inside[:, :, None], other=0).to(tl.int32)
    first = tl.load(nf4_code + (byte >> 4)) * scale
    second = tl.load(nf4_code + (byte & 15)) * scale
    return tl.reshape(tl.interleave(first, second), (ROWS, COLUMNS))


@triton.jit
def _side(
    hidden,
    factor,
    rows,
    columns,
    num_columns,
    first,
    rank,
    stride_o,
    stride_r,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`hidden @ factor.T` of the ranks from `first` on, RANK of them."""
    ranks = first + tl.arange(0, RANK)
    h = tl.load(hidden + rows[:, None] * rank + ranks[None, :], mask=ranks[None, :] < rank, other=0.0)
    inside = (columns[None, :] < num_columns) & (ranks[:, None] < rank)
    f = tl.load(factor + columns[None, :] * stride_o + ranks[:, None] * stride_r, mask=inside, other=0.0)
    return tl.dot(h, f, input_precision=PRECISION)


@triton.jit
def product(
    x,
    out,
    expert_of_tile,
    packed,
    absmax,
    absmax2,
    offset,
    absmax_code,
    nf4_code,
    bias,
    hidden,
    factor,
    keep,
    weight_rows,
    weight_columns,
    blocks,
    superblocks,
    factor_stride_e,
    factor_stride_o,
    factor_stride_r,
    rank,
    keep_scale,
    NUM_EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    MANY_RANKS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x @ W[expert]`, or with TRANSPOSED `x @ W[expert].T`; plus bias; plus `hidden @ factor[expert].T` (RANK > 0).

    RANK ranks are taken at a time; with MANY_RANKS there are more than these.

    W is the weight as stored, of `weight_rows` and `weight_columns` in all; for its parts see `_decoded`.
    """
    tile = tl.program_id(0)
    expert = tl.load(expert_of_tile + tile)
    if expert >= NUM_EXPERTS:
        return
    expert = expert.to(tl.int64)
    if TRANSPOSED:
        num_in, num_out = weight_columns, weight_rows
    else:
        num_in, num_out = weight_rows, weight_columns
    packed += expert * ((weight_rows * weight_columns) // 2)
    absmax += expert * PARTS * blocks
    absmax2 += expert * PARTS * superblocks
    offset += expert * PARTS
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = columns < num_out
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_in, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        part = tl.load(x + rows[:, None] * num_in + inner[None, :], mask=inner[None, :] < num_in, other=0.0)
        if TRANSPOSED:
            weight = tl.trans(
                _decoded(
                    packed,
                    absmax,
                    absmax2,
                    offset,
                    absmax_code,
                    nf4_code,
                    tl.program_id(1) * BLOCK_N,
                    start,
                    weight_rows,
                    weight_columns,
                    superblocks,
                    PARTS,
                    SIDE_BY_SIDE,
                    BLOCK_N,
                    BLOCK_K,
                ).to(part.dtype)
            )
        else:
            weight = _decoded(
                packed,
                absmax,
                absmax2,
                offset,
                absmax_code,
                nf4_code,
                start,
                tl.program_id(1) * BLOCK_N,
                weight_rows,
                weight_columns,
                superblocks,
                PARTS,
                SIDE_BY_SIDE,
                BLOCK_K,
                BLOCK_N,
            ).to(part.dtype)
        total += tl.dot(part, weight, input_precision=PRECISION)
    if RANK > 0:
        factor += expert * factor_stride_e
        side = _side(hidden, factor, rows, columns, num_out, 0, rank, factor_stride_o, factor_stride_r, RANK, PRECISION)
        if MANY_RANKS:
            for first in tl.range(RANK, rank, RANK, num_stages=1):
                side += _side(
                    hidden,
                    factor,
                    rows,
                    columns,
                    num_out,
                    first,
                    rank,
                    factor_stride_o,
                    factor_stride_r,
                    RANK,
                    PRECISION,
                )
        if HAS_KEEP:
            kept = tl.load(keep + rows[:, None] * num_out + columns[None, :], mask=real[None, :], other=0)
            side = tl.where(kept != 0, side * keep_scale, 0.0)
        total += side
    if HAS_BIAS:
        total += tl.load(bias + expert * num_out + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * num_out + columns[None, :], total.to(out.dtype.element_ty), mask=real[None, :])


@triton.jit
def to_rank(
    x,
    factor,
    out,
    expert_of_tile,
    num_in,
    factor_stride_e,
    factor_stride_r,
    factor_stride_i,
    rank,
    NUM_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x @ factor[expert].T`, RANK columns in a program."""
    tile = tl.program_id(0)
    expert = tl.load(expert_of_tile + tile)
    if expert >= NUM_EXPERTS:
        return
    factor += expert.to(tl.int64) * factor_stride_e
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for start in range(0, num_in, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        part = tl.load(x + rows[:, None] * num_in + inner[None, :], mask=inner[None, :] < num_in, other=0.0)
        f = tl.load(
            factor + ranks[None, :] * factor_stride_r + inner[:, None] * factor_stride_i,
            mask=(ranks[None, :] < rank) & (inner[:, None] < num_in),
            other=0.0,
        )
        total += tl.dot(part, f, input_precision=PRECISION)
    at = out + rows[:, None] * rank + ranks[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=ranks[None, :] < rank)


@triton.jit
def outer(
    left,
    right,
    out,
    starts,
    ends,
    rank,
    num_columns,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`left.T @ right` over one expert's rows: RANK rows and BLOCK_N columns of `out` (E, rank, columns)."""
    expert = tl.program_id(0)
    ranks = tl.program_id(2) * RANK + tl.arange(0, RANK)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((RANK, BLOCK_N), dtype=tl.float32)
    for start in range(tl.load(starts + expert), tl.load(ends + expert), BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        a = tl.load(left + rows[None, :] * rank + ranks[:, None], mask=ranks[:, None] < rank, other=0.0)
        b = tl.load(
            right + rows[:, None] * num_columns + columns[None, :], mask=columns[None, :] < num_columns, other=0.0
        )
        total += tl.dot(a, b, input_precision=PRECISION)
    at = out + (expert.to(tl.int64) * rank + ranks[:, None]) * num_columns + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(ranks[:, None] < rank) & (columns[None, :] < num_columns))
