"""The share of this machine's matmul rate that a training step reaches: `python benchmarks/roofline.py --help`.

Each matrix product of the step (forward and input gradient of frozen weights, LoRA, attention, the head) is timed
separately, at its shape, on existing dense matrices. Their sum is the time of a step that does nothing else. Steps and
products take turns in one process. Prints one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from train_step import parse, train_steps, with_adapter, write_base

import lola_ft
from lola_ft.kernels.grouping import padded_rows
from lola_ft.training.precision import choose_precision

Product = tuple[int, int, int, int]
"""A matrix product: batch, rows, depth, columns."""


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    precision = choose_precision("bfloat16", device)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args)
        quantization = None if args.quantization == "none" else args.quantization
        base = lola_ft.load_base(folder, quantization, precision.dtype, device, quiet=True)
    model = with_adapter(base, args.rank, args.checkpointing)
    products = products_of(args)
    steps, ceilings = [], []
    for _ in range(args.steps):
        steps += train_steps(model, args.batch, args.seq, int(not steps), 1, precision)[0]
        ceilings.append(sum(count * seconds(product, precision.dtype, device) for product, count in products.items()))
    flops = sum(2 * b * n * k * m * count for (b, n, k, m), count in products.items())
    step_s, ceiling_s = statistics.median(steps), statistics.median(ceilings)
    print(
        json.dumps(
            {
                "share": round(statistics.median(c / s for c, s in zip(ceilings, steps, strict=True)), 4),
                "step_s": round(step_s, 4),
                "products_alone_s": round(ceiling_s, 4),
                "gflops": round(flops / step_s / 1e9, 1),
                "products_alone_gflops": round(flops / ceiling_s / 1e9, 1),
                "tokens_per_s": round(args.batch * args.seq / step_s, 1),
                "dtype": str(precision.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            }
        )
    )


def products_of(args: argparse.Namespace) -> Counter[Product]:
    """Return the number of times of every matrix product in a step. Experts get equal numbers of tokens."""
    tokens, hidden, inner, rank = args.batch * args.seq, args.hidden, args.inner, args.rank
    dense_layers, moe_layers = (args.layers + 1) // 2, args.layers // 2
    rows = padded_rows(-(-tokens // args.experts))
    products: Counter[Product] = Counter()
    for count, n, inputs, outputs in (
        (args.layers, tokens, hidden, 3 * hidden),
        (args.layers, tokens, hidden, hidden),
        (dense_layers, tokens, hidden, inner),
        (dense_layers, tokens, inner, hidden),
        (moe_layers * args.experts, rows, hidden, inner),
        (moe_layers * args.experts, rows, inner, hidden),
    ):
        again = 2 if args.checkpointing else 1
        products[1, n, inputs, outputs] += count * again
        products[1, n, outputs, inputs] += count
        products[1, n, inputs, rank] += count * (again + 1)  # to the rank, and its input's gradient from there
        products[1, n, rank, outputs] += count * again
        products[1, n, outputs, rank] += count
        products[1, rank, n, inputs] += count  # the gradients of A and B
        products[1, rank, n, outputs] += count
    heads, width = args.batch * args.heads, hidden // args.heads
    # Scores and output in forward; scores again and four gradients in backward. (The masked half is computed, too.)
    products[heads, args.seq, width, args.seq] += args.layers * 3
    products[heads, args.seq, args.seq, width] += args.layers * 4
    products[1, tokens, hidden, args.vocab] += 1
    products[1, tokens, args.vocab, hidden] += 1
    return products


def seconds(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Return the median seconds of one product."""
    batch, n, k, m = product
    a, b = torch.randn(batch, n, k, dtype=dtype, device=device), torch.randn(batch, k, m, dtype=dtype, device=device)
    multiply = torch.bmm if batch > 1 else torch.mm
    a, b = (a, b) if batch > 1 else (a[0], b[0])
    times = []
    for _ in range(4):
        began = time.perf_counter()
        multiply(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
