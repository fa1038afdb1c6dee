"""Merging at LOLA's exact shapes: time compared with a copy of the same bytes, and peak memory.

    python benchmarks/merge.py [--layers 24] [--folder DIR]

Merges a random LoRA adapter of rank 16 on attention, dense MLP and every expert into a random bfloat16 checkpoint. Each
stage runs in its own process. Needs 45 GB of disk, prints one JSON line last, and removes what it wrote.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from memory import Peak, read_memory
from random_checkpoint import write_checkpoint, write_random_adapter


def main() -> None:
    args = parse()
    folder = Path(tempfile.mkdtemp(prefix="lola-merge-", dir=args.folder))
    try:
        print(json.dumps(measure(folder, args)))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write base and adapter, then copy, merge, copy, and merge with the proof from the files."""
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    base.mkdir()
    sizes = {key: getattr(args, key) for key in SIZES if getattr(args, key)}
    alone(write_checkpoint, base, torch.bfloat16, args.layers, **sizes)
    alone(write_random_adapter, adapter, base, args.rank)
    copies = [alone(timed_copy, base, folder / "copy")]
    result = alone(timed_merge, base, adapter, merged, "none")
    copies.append(alone(timed_copy, base, folder / "copy"))
    proved = alone(timed_merge, base, adapter, merged, "weights")
    copy = sum(copies) / len(copies)
    return {
        "merge_s": round(result["seconds"], 4),
        "copy_s": [round(seconds, 4) for seconds in copies],
        "ratio": round(result["seconds"] / copy, 3),
        "merge_and_proof_s": round(proved["seconds"], 4),
        "memory_mb": {"merge": result["memory"], "merge_and_proof": proved["memory"]},
        "base_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "adapter_tensors": result["applied"],
        "proof": proved["found"],
        "layers": args.layers,
        "rank": args.rank,
        "threads": torch.get_num_threads(),
    }


def alone(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function in a new process, so that nothing before it counts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def timed_copy(source: Path, target: Path) -> float:
    """Copy a folder's weights, sync and remove the copy; return the seconds."""
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb+") as handle:
            os.fsync(handle.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def timed_merge(base: Path, adapter: Path, merged: Path, check: str) -> dict[str, Any]:
    """Merge and remove the result; return seconds, memory and figures of the report."""
    from lola_ft.merging import merge

    imports = read_memory()
    with Peak() as peak:
        began = time.perf_counter()
        report = merge(base, adapter, merged, check=check)
        seconds = time.perf_counter() - began
    shutil.rmtree(merged)
    found = None
    if report.weights:
        found = {key: getattr(report.weights, key) for key in ("tensors", "untouched", "applied_once", "largest_error")}
    return {
        "seconds": seconds,
        "memory": {"after_imports": imports, "peak": peak.result()},
        "applied": report.applied,
        "found": found,
    }


SIZES = ("n_embd", "n_inner", "num_experts", "vocab_size")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; the system's temporary folder if left out")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--rank", type=int, default=16)
    for option, key in zip(("--hidden", "--inner", "--experts", "--vocab"), SIZES, strict=True):
        parser.add_argument(option, dest=key, type=int, help=f"{key}; LOLA's own if left out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
