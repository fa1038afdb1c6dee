"""Memory and speed of a long run whose batches differ in length: `python benchmarks/long_run.py --help`.

Two ways take the same batches, each in its own process: `as they are`, padded to the longest row of the batch; and
`few lengths`, padded to a multiple, as in a run without packing on a CPU. Prints one JSON line last. Memory is the
process's own (anonymous) after each step; the first steps, in which every size is new, are left out of the growth.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from memory import read_memory
from train_step import make_parser, one_step, with_adapter, write_base

import lola_ft
from lola_ft.memory import keep_freed_memory
from lola_ft.start import set_library_defaults
from lola_ft.training.callbacks.resources import FreedMemory
from lola_ft.training.precision import choose_precision
from lola_ft.training.trainers.arguments import padding_multiple

WAYS = ("as they are", "few lengths")


def main() -> None:
    parser = make_parser(layers=2, steps=500, warmup=50)
    parser.add_argument("--shortest", type=int, default=32, help="tokens; rows are between this and --seq long")
    args = parser.parse_args()
    set_library_defaults()  # as a command does; each way imports torch in a process of its own
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args)
        found = {}
        for way in WAYS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[way] = pool.submit(long_run, way, folder, args).result()
            print(way, json.dumps(found[way]), flush=True)
    times = found["as they are"]["step_s"] / found["few lengths"]["step_s"]
    shape = {key: value for key, value in vars(args).items() if key != "device"}
    print(
        json.dumps(
            {
                "ways": found,
                "few_lengths_are_times_faster": round(times, 3),
                "wanted": {"growth": 1.1},
                "threads": torch.get_num_threads(),
                "load_average": os.getloadavg()[0],
                "shape": shape,
            }
        )
    )


def long_run(way: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train on batches of changing length; return medians, memory after the warm-up and at the end, and its growth."""
    precision = choose_precision("bfloat16", torch.device(args.device))
    base = lola_ft.load_base(folder, args.quantization, precision.dtype, args.device, quiet=True)
    model = with_adapter(base, args.rank, args.checkpointing)
    keep_freed_memory()  # as a run does, like the next line
    freed = FreedMemory() if args.device == "cpu" else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    multiple = padding_multiple(args.seq, torch.device(args.device)) if way == "few lengths" else None
    lengths = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    seconds, memory, real, padded = [], [], 0, 0
    for step in range(args.steps):
        rows = torch.randint(args.shortest, args.seq + 1, (args.batch,), generator=lengths)
        longest = int(rows.max())
        length = longest if multiple is None else -(-longest // multiple) * multiple
        mask = (torch.arange(length) < rows[:, None]).long()
        ids = torch.randint(6, model.config.vocab_size, (args.batch, length)).where(mask.bool(), 1)
        labels = ids.where(mask.bool(), -100)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        began = time.perf_counter()
        loss = one_step(model, optimizer, inputs, precision)
        if freed is not None:
            freed.after_step()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - began)
        memory.append(read_memory()["anonymous"])
        real, padded = real + int(mask.sum()), padded + mask.numel()
    after = statistics.median(memory[max(0, args.warmup - 10) : args.warmup])
    at_the_end = statistics.median(memory[-args.steps // 10 :])
    return {
        "step_s": round(statistics.median(seconds), 4),
        "mean_step_s": round(statistics.mean(seconds), 4),
        "memory_mb": {f"step {args.warmup}": after, "last tenth": at_the_end, "largest": max(memory)},
        "growth": round(at_the_end / after, 3),
        "share_of_real_tokens": round(real / padded, 3),
        "loss": round(loss, 4),
    }


if __name__ == "__main__":
    main()
