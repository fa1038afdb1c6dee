"""Loading at LOLA's exact shapes: quantising while reading, then from the cache. `python benchmarks/load.py --help`

By default the model has fewer layers than LOLA. `--layers 24` is the full model (20 GB of disk for bfloat16 shards,
35 GB for float32). Prints one JSON line last and removes what it wrote. Memory is the process's own (anonymous) and its
resident peak. A child process writes the checkpoint, so that writing does not count.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from memory import Peak, read_memory
from random_checkpoint import write_checkpoint

import lola_ft
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.model import LolaForCausalLM
from lola_ft.quantization import audit
from lola_ft.quantization.cache import source_identity, write_cache
from lola_ft.quantization.nf4 import quantize


def main() -> None:
    args = make_parser(layers=4).parse_args()
    print_result(args, lambda folder: measure_load(folder, args)[1])


def print_result(args: argparse.Namespace, measure: Callable[[Path], dict[str, Any]]) -> None:
    """Measure in a folder that is removed afterwards, and print one JSON line."""
    folder = Path(tempfile.mkdtemp(prefix="lola-benchmark-", dir=args.folder))
    try:
        print(json.dumps(measure(folder)))
    finally:
        shutil.rmtree(folder)


def measure_load(folder: Path, args: argparse.Namespace) -> tuple[LolaForCausalLM, dict[str, Any]]:
    """Return the loaded model, and the time and memory of loading it."""
    seconds: dict[str, float] = {}
    memory: dict[str, Any] = {}
    source = folder / "base"
    os.environ["LOLA_FT_CACHE"] = str(folder / "cache")
    seconds["write_checkpoint"] = in_child(write_checkpoint, source, getattr(torch, args.source_dtype), args.layers)[0]
    seconds |= in_child(time_parts, source)[1]
    memory["after_imports"] = read_memory()
    with Peak() as peak:
        began = time.perf_counter()
        model = lola_ft.load_base(source, "nf4", args.dtype, device="cpu")
        seconds["load"] = time.perf_counter() - began
    memory["load"] = peak.result()
    memory["loaded"] = read_memory()
    began = time.perf_counter()
    write_cache(model, source_identity(BaseCheckpoint.open(source), model.base_fingerprint, model.dtype), source)
    seconds["write_cache"] = time.perf_counter() - began
    seconds["load_from_cache"], memory["load_from_cache"] = in_child(load_again, source, args.dtype)[1]
    parts = audit(model).as_dict()
    return model, {
        "source_dtype": args.source_dtype,
        "dense_dtype": args.dtype,
        "parts": parts,
        "quantised_bytes": sum(part["bytes"] for part in parts.values()),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "load_over_quantising_alone": round(seconds["load"] / seconds["quantise_alone"], 3),
        "memory_mb": memory,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def time_parts(source: Path) -> dict[str, float]:
    """Return the seconds of the parts of loading: reading every weight, and quantising weights from memory.

    The time of bitsandbytes' own quantiser is estimated from two weights of each shape.
    """
    seconds: dict[str, float] = defaultdict(float)
    weights: dict[tuple[int, ...], int] = Counter()
    checkpoint = BaseCheckpoint.open(source)
    for entry in checkpoint:
        began = time.perf_counter()
        tensor = entry.read()
        seconds["read_alone"] += time.perf_counter() - began
        if checkpoint.architecture.places[entry.name].quantized:
            weights[entry.shape] += 1
            began = time.perf_counter()
            quantize(tensor)
            seconds["quantise_alone"] += time.perf_counter() - began
            if weights[entry.shape] <= 2:
                began = time.perf_counter()
                bitsandbytes.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
                seconds[f"bitsandbytes {entry.shape}"] += (time.perf_counter() - began) / 2
    upstream = sum(seconds.pop(f"bitsandbytes {shape}") * count for shape, count in weights.items())
    return dict(seconds) | {"quantise_alone_bitsandbytes_estimated": upstream}


def load_again(source: Path, dtype: str) -> tuple[float, dict[str, float]]:
    """Return seconds and peak memory of a load from the cache."""
    with Peak() as peak:
        began = time.perf_counter()
        lola_ft.load_base(source, "nf4", dtype, device="cpu", quiet=True)
        elapsed = time.perf_counter() - began
    return elapsed, peak.result()


def in_child(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Run a stage in its own process, so that its memory does not count here; return seconds and result."""
    began = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
    return time.perf_counter() - began, result


def make_parser(**defaults: int) -> argparse.ArgumentParser:
    """Return the parser of the command line, which `full_size.py` uses, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what stays dense")
    parser.add_argument("--folder", help="where to write the checkpoint; the system's temporary folder if left out")
    parser.add_argument("--layers", type=int, default=defaults["layers"], help=f"default: {defaults['layers']}")
    parser.add_argument("--seq", type=int, default=256, help="of the training step")
    return parser


if __name__ == "__main__":
    main()
