"""LOLA's exact shapes with random weights, on this machine: write, load in NF4, a few tokens, one training step.

    python benchmarks/full_size.py [--source-dtype bfloat16|float32] [--folder DIR] [--load-only]

Needs 20 GB of disk for bfloat16 shards, 35 GB for float32. Prints one JSON line last and removes what it wrote. Memory
is the process's own (anonymous) and its resident peak, sampled ten times a second; the checkpoint is written by a child
process, so that writing does not count.
"""

import argparse
import gc
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
from lola_ft.adapters import AdapterSettings, attach, lora_config
from lola_ft.model.hub_checkpoint import HubCheckpoint
from lola_ft.model.layout import place_of
from lola_ft.quantization import audit
from lola_ft.quantization.cache import source_identity, write_cache
from lola_ft.quantization.nf4 import quantize


def main() -> None:
    args = parse()
    folder = Path(tempfile.mkdtemp(prefix="lola-full-size-", dir=args.folder))
    try:
        print(json.dumps(measure(folder, args)))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every stage and report it."""
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
    parts = audit(model).as_dict()
    memory["loaded"] = read_memory()
    began = time.perf_counter()
    write_cache(model, source_identity(HubCheckpoint.open(source), model.base_fingerprint, model.dtype), source)
    seconds["write_cache"] = time.perf_counter() - began
    seconds["load_from_cache"], memory["load_from_cache"] = in_child(load_again, source, args.dtype)[1]
    compute_dtype = args.dtype
    if not args.load_only:
        from lola_ft.training.precision import choose_precision  # only now: loading alone does not need the trainer

        if not choose_precision("bfloat16", torch.device("cpu")).bf16:
            compute_dtype = "float32"
            model.float()  # what stays dense; bfloat16 products take this CPU hundreds of times longer
        compute(model, args, compute_dtype, memory, seconds)
    return {
        "source_dtype": args.source_dtype,
        "dense_dtype": args.dtype,
        "compute_dtype": compute_dtype,
        "parts": parts,
        "quantised_bytes": sum(part["bytes"] for part in parts.values()),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "memory_mb": memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def compute(
    model: torch.nn.Module,
    args: argparse.Namespace,
    compute_dtype: str,
    memory: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """A forward, a few tokens and a training step; notes memory and seconds."""
    ids = torch.randint(6, 100_000, (1, args.seq))
    with torch.no_grad(), Peak() as peak:
        began = time.perf_counter()
        model(ids[:, :64])
        seconds["forward_64_tokens"] = time.perf_counter() - began
        began = time.perf_counter()
        model.generate(ids[:, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
        seconds["generate_8_tokens"] = time.perf_counter() - began
    memory["forward"] = peak.result()
    with Peak() as peak:
        seconds["train_step"] = train_step(model, ids, compute_dtype)
    memory["train"] = peak.result()


def train_step(model: torch.nn.Module, ids: torch.Tensor, compute_dtype: str) -> float:
    """One step of LoRA on attention and all experts with gradient checkpointing; seconds."""
    began = time.perf_counter()
    peft_model = attach(model, lora_config(AdapterSettings(attention_rank=16, expert_rank=16))).train()  # type: ignore[arg-type]
    peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype == "bfloat16"):
        loss = peft_model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    return time.perf_counter() - began


def time_parts(source: Path) -> dict[str, float]:
    """Seconds of what loading is made of: reading every weight, and quantising what is quantised from memory.

    Also what bitsandbytes' own quantiser would take for it, from two weights of each shape.
    """
    seconds: dict[str, float] = defaultdict(float)
    weights: dict[tuple[int, ...], int] = Counter()
    for entry in HubCheckpoint.open(source):
        began = time.perf_counter()
        tensor = entry.read()
        seconds["read_alone"] += time.perf_counter() - began
        place = place_of(entry.name)
        if place.transposed or (place.expert_id is not None and len(entry.shape) == 2):
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
    """Seconds and peak memory of a load that finds the cache."""
    with Peak() as peak:
        began = time.perf_counter()
        lola_ft.load_base(source, "nf4", dtype, device="cpu", quiet=True)
        elapsed = time.perf_counter() - began
    return elapsed, peak.result()


def in_child(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Run a stage in a process of its own, so that its memory does not count here; seconds and result."""
    began = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
    return time.perf_counter() - began, result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what stays dense")
    parser.add_argument("--folder", help="where to write the checkpoint; the system's temporary folder if left out")
    parser.add_argument("--load-only", action="store_true", help="stop after loading")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--seq", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
