"""The share of this machine's matmul rate that training steps reach: `python benchmarks/roofline.py --help`.

Each matrix product of a step (forward and input gradient of frozen weights, LoRA, attention, the head) is timed
separately, at its shape, on existing dense matrices. Their sum is the time of a step that does nothing else. Steps and
products take turns in one process; so do the models if `--beside` names a second family. Prints one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import SHAPES, with_shape
from train_step import make_parser, train_steps, with_adapter, write_base

import lola_ft
from lola_ft.families import architecture_of
from lola_ft.kernels.grouping import padded_rows
from lola_ft.model.experts import FusedExperts
from lola_ft.training.precision import Precision, choose_precision

Product = tuple[int, int, int, int]
"""A matrix product: batch, rows, depth, columns."""


def main() -> None:
    parser = make_parser(steps=5)
    parser.add_argument("--beside", choices=SHAPES, help="a family to measure in turns with the first")
    args = parser.parse_args()
    precision = choose_precision("bfloat16", torch.device(args.device))
    cases = {args.family: Case(args, precision)}
    if args.beside:
        cases[args.beside] = Case(with_shape(args, args.beside, **SHAPES[args.beside]), precision)
    for _ in range(args.steps):
        for case in cases.values():
            case.measure()
    result: dict[str, Any] = {name: case.result() for name, case in cases.items()}
    shares = [statistics.median(case.shares) for case in cases.values()]
    print(
        json.dumps(
            result[args.family]
            | {name: result[name] for name in result if name != args.family}
            | ({"share_beside": round(shares[1] / shares[0], 3)} if args.beside else {})
            | {"dtype": str(precision.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        )
    )


@dataclass
class Case:
    """A model with its adapter, the seconds of its steps, and those of their products alone, in turns."""

    args: argparse.Namespace
    precision: Precision
    steps: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        args, device = self.args, torch.device(self.args.device)
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder), args)
            quantization = None if args.quantization == "none" else args.quantization
            base = lola_ft.load_base(folder, quantization, self.precision.dtype, device, quiet=True)
        self.products = products_of(base, args)
        self.model = with_adapter(base, args.rank, args.checkpointing)

    def measure(self) -> None:
        args, device = self.args, torch.device(self.args.device)
        self.steps += train_steps(self.model, args.batch, args.seq, int(not self.steps), 1, self.precision)[0]
        timed = (count * seconds(product, self.precision.dtype, device) for product, count in self.products.items())
        self.ceilings.append(sum(timed))

    @property
    def shares(self) -> list[float]:
        return [ceiling / step for ceiling, step in zip(self.ceilings, self.steps, strict=True)]

    def result(self) -> dict[str, Any]:
        flops = sum(2 * b * n * k * m * count for (b, n, k, m), count in self.products.items())
        step_s, ceiling_s = statistics.median(self.steps), statistics.median(self.ceilings)
        return {
            "share": round(statistics.median(self.shares), 4),
            "shares": [round(share, 3) for share in sorted(self.shares)],
            "step_s": round(step_s, 4),
            "products_alone_s": round(ceiling_s, 4),
            "gflops": round(flops / step_s / 1e9, 1),
            "products_alone_gflops": round(flops / ceiling_s / 1e9, 1),
            "tokens_per_s": round(self.args.batch * self.args.seq / step_s, 1),
        }


def products_of(base: Any, args: argparse.Namespace) -> Counter[Product]:
    """Return the number of times of every matrix product in a step. Experts get equal numbers of rows."""
    architecture = architecture_of(base.config)
    sizes, tokens, rank = architecture.sizes, args.batch * args.seq, args.rank
    matrices: Counter[tuple[int, int, int]] = Counter()  # rows, inputs, outputs
    for name in {place.module for place in architecture.places.values() if place.quantized}:
        module = base.get_submodule(name)
        if isinstance(module, FusedExperts):
            rows = padded_rows(-(-tokens * sizes.top_k // sizes.num_experts))
            for inputs, outputs in module.shapes.values():
                matrices[rows, inputs, outputs] += sizes.num_experts
        else:
            matrices[tokens, module.in_features, module.out_features] += 1
    products: Counter[Product] = Counter()
    again = 2 if args.checkpointing else 1
    for (n, inputs, outputs), count in matrices.items():
        products[1, n, inputs, outputs] += count * again
        products[1, n, outputs, inputs] += count
        products[1, n, inputs, rank] += count * (again + 1)  # to the rank, and its input's gradient from there
        products[1, n, rank, outputs] += count * again
        products[1, n, outputs, rank] += count
        products[1, rank, n, inputs] += count  # the gradients of A and B
        products[1, rank, n, outputs] += count
    heads, width = args.batch * args.heads, args.hidden // args.heads
    # Scores and output in forward; scores again and four gradients in backward. (The masked half is computed, too.)
    products[heads, args.seq, width, args.seq] += args.layers * 3
    products[heads, args.seq, args.seq, width] += args.layers * 4
    products[1, tokens, args.hidden, args.vocab] += 1
    products[1, tokens, args.vocab, args.hidden] += 1
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
