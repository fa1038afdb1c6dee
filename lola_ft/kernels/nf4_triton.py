"""Triton kernels for grouped rows: products with 4-bit weights that are decoded inside the K loop, and their LoRA.

The idea: a program computes one tile of the output, `BLOCK_M` rows of one expert by `BLOCK_N` columns. It steps through
the summed dimension, `BLOCK_K` at a time. In each step it decodes one tile of the 4-bit weight into registers and
multiplies with it, so that the dense weight never reaches memory. Decoded values equal those of dequantising the whole
weight, bit for bit. Sums are float32.

How one weight is decoded (NF4 with double quantisation, arXiv 2305.14314), with 128 columns, so 2 blocks per row:

    weight at row 3, column 70     lies in block 3 * 2 + 70 // 64 = 7, at place 70 % 64 = 6 of it
    its byte                       packed[7 * 32 + 6 // 2]; the high 4 bits, because place 6 is even (odd: low 4 bits)
    its block's scale              absmax_code[absmax[7]] * absmax2[7 // 256] + offset
    its value                      nf4_code[4-bit code] * scale

Everything runs under Triton's interpreter on a CPU (TRITON_INTERPRET=1), which is how it is tested without a GPU.

Letters in shapes: M rows of a tile (BLOCK_M), N its columns (BLOCK_N), K one step of the summed dimension (BLOCK_K),
R the rank rounded up (RANK); `rank` is the real one.
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
    """Decode a tile (ROWS, COLUMNS) of one expert's weight to float32; zeros outside the weight.

    The weight (num_rows, num_columns) consists of PARTS matrices, which were quantised separately and follow each other
    in memory. Within the weight they lie side by side (SIDE_BY_SIDE) or one below another. Each has its own scales: a
    number of `superblocks` blocks of 256, and their mean.

    Args:
        first_row, first_column: The tile's first entry; the column is a multiple of BLOCK, like COLUMNS.
    """
    # One entry per block of 64 weights, (ROWS, COLUMNS / 64): its row and its column, counted in blocks
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column // BLOCK + tl.arange(0, COLUMNS // BLOCK)
    row, column = rows[:, None], columns[None, :]
    blocks_per_row = num_columns // BLOCK
    inside = (row < num_rows) & (column < blocks_per_row)
    # Number of each block in memory, its superblock, and the mean of its matrix's scales
    if PARTS == 1:
        block = row * blocks_per_row + column
        superblock = block // _SUPERBLOCK
        mean = tl.load(offset)
    else:
        # The part that a block lies in, and its number within that part. (`+ row * 0` gives the full tile shape.)
        if SIDE_BY_SIDE:
            blocks_per_row = blocks_per_row // PARTS
            part = column // blocks_per_row + row * 0
            part_rows = num_rows
            block = row * blocks_per_row + column % blocks_per_row
        else:
            part_rows = num_rows // PARTS
            part = row // part_rows + column * 0
            block = (row % part_rows) * blocks_per_row + column
        superblock = part * superblocks + block // _SUPERBLOCK
        mean = tl.load(offset + part, mask=inside, other=0.0)
        # Skip the blocks of the parts before.
        block += part * part_rows * blocks_per_row
    # scale = absmax_code[absmax] * absmax2 + mean, (ROWS, COLUMNS / 64, 1)
    code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax_code + code) * tl.load(absmax2 + superblock, mask=inside, other=0.0) + mean
    scale = tl.where(inside, scale, 0.0)[:, :, None]
    # The 32 bytes of each block, (ROWS, COLUMNS / 64, 32), with two codes in each
    at = block[:, :, None] * _PAIRS + tl.arange(0, _PAIRS)[None, None, :]
    byte = tl.load(packed + at, mask=inside[:, :, None], other=0).to(tl.int32)
    # High bits are the first weight of a pair: interleave to (ROWS, COLUMNS / 64, 64), which is (ROWS, COLUMNS)
    first = tl.load(nf4_code + (byte >> 4)) * scale
    second = tl.load(nf4_code + (byte & 15)) * scale
    return tl.reshape(tl.interleave(first, second), (ROWS, COLUMNS))


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
    HAS_KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute `x @ W[expert]`, or with TRANSPOSED `x @ W[expert].T`, plus the bias and a LoRA side path.

    The side path (if RANK > 0) is `hidden @ factor[expert].T`, and with HAS_KEEP multiplied by `keep * keep_scale`.

    Args:
        x, out: (rows of the buffer, num_in) and (rows of the buffer, num_out), where a program has the rows of tile
            `program_id(0)` and the columns of block `program_id(1)`.
        weight_rows, weight_columns: Shape of W, one expert's weight as stored; for its parts see `_decoded`.
        blocks, superblocks: Blocks of 64 weights, and of 256 scales, in one quantised matrix.
        keep: (rows of the buffer, num_out) bool.
    """
    # This program's expert; tiles after the last group have none.
    tile = tl.program_id(0)
    expert = tl.load(expert_of_tile + tile)
    if expert >= NUM_EXPERTS:
        return
    expert = expert.to(tl.int64)
    if TRANSPOSED:
        num_in, num_out = weight_columns, weight_rows
    else:
        num_in, num_out = weight_rows, weight_columns
    # Move the pointers to this expert's codes and scales.
    packed += expert * ((weight_rows * weight_columns) // 2)
    absmax += expert * PARTS * blocks
    absmax2 += expert * PARTS * superblocks
    offset += expert * PARTS
    # total (M, N) += x (M, K) @ weight (K, N), for each step of K along the inputs
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = columns < num_out
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_in, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        part = tl.load(x + rows[:, None] * num_in + inner[None, :], mask=inner[None, :] < num_in, other=0.0)
        # W is (inputs, outputs), or transposed (outputs, inputs): the tile is decoded as stored, then turned
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
    # LoRA: total (M, N) += hidden (M, R) @ factor.T (R, N), with dropout's mask (M, N)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        h = tl.load(hidden + rows[:, None] * rank + ranks[None, :], mask=ranks[None, :] < rank, other=0.0)
        f = tl.load(
            factor + expert * factor_stride_e + columns[None, :] * factor_stride_o + ranks[:, None] * factor_stride_r,
            mask=real[None, :] & (ranks[:, None] < rank),
            other=0.0,
        )
        side = tl.dot(h, f, input_precision=PRECISION)
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
    """Compute `x @ factor[expert].T`: a program has BLOCK_M rows and all RANK columns."""
    tile = tl.program_id(0)
    expert = tl.load(expert_of_tile + tile)
    if expert >= NUM_EXPERTS:
        return
    factor += expert.to(tl.int64) * factor_stride_e
    # total (M, R) += x (M, K) @ factor.T (K, R), for each step of K along the inputs
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks = tl.arange(0, RANK)
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
    """Compute `left.T @ right` over one expert's rows: `rank` rows and BLOCK_N columns of `out` (E, rank, columns)."""
    expert = tl.program_id(0)
    ranks = tl.arange(0, RANK)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # total (R, N) += left.T (R, M) @ right (M, N), for each tile of M rows of the expert; zeros if it has none
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
