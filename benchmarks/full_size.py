"""LOLA's exact shapes with random weights, on this machine: write, load in NF4, one training step, a few tokens.

    python benchmarks/full_size.py [--source-dtype bfloat16|float32] [--folder DIR] [--load-only]

Needs 15 GB of disk for bfloat16 shards, 30 GB for float32. Prints one JSON line last and removes what it wrote. Memory
is the process's own (anonymous) and its resident peak, sampled ten times a second; the checkpoint is written by a child
process, so that writing does not count.
"""

import argparse
import gc
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import Peak, read_memory
from random_checkpoint import write_checkpoint

import lola_ft
from lola_ft.adapters import AdapterSettings, attach, lora_config
from lola_ft.quantization import audit
from lola_ft.training.precision import choose_precision


def main() -> None:
    args = parse()
    folder = Path(tempfile.mkdtemp(prefix="lola-full-size-", dir=args.folder))
    try:
        print(json.dumps(measure(folder, args)))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every stage and report it."""
    source_dtype = getattr(torch, args.source_dtype)
    precision = choose_precision("bfloat16", torch.device("cpu"))
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    child = multiprocessing.get_context("spawn").Process(
        target=write_checkpoint, args=(folder, source_dtype, args.layers)
    )
    child.start()
    child.join()
    assert child.exitcode == 0, "the checkpoint was not written"
    seconds["write"] = time.perf_counter() - began
    memory = {"after_imports": read_memory()}
    with Peak() as peak:
        began = time.perf_counter()
        model = lola_ft.load_base(folder, "nf4", args.dtype, device="cpu")
        seconds["load"] = time.perf_counter() - began
    memory["load"] = peak.result()
    parts = audit(model).as_dict()
    memory["loaded"] = read_memory()
    if not args.load_only:
        compute(model, args, precision.bf16, memory, seconds)
    return {
        "source_dtype": args.source_dtype,
        "compute_dtype": args.dtype,
        "parts": parts,
        "quantised_bytes": sum(part["bytes"] for part in parts.values()),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "memory_mb": memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def compute(
    model: torch.nn.Module, args: argparse.Namespace, bf16: bool, memory: dict[str, Any], seconds: dict[str, float]
) -> None:
    """A forward, a training step and a few tokens; notes memory and seconds."""
    ids = torch.randint(6, 100_000, (1, args.seq))
    with Peak() as peak:
        began = time.perf_counter()
        with torch.no_grad():
            model(ids[:, :64])
        seconds["forward_64_tokens"] = time.perf_counter() - began
        seconds["train_step"] = train_step(model, ids, bf16)
    memory["train"] = peak.result()
    began = time.perf_counter()
    with torch.no_grad():
        model.eval()
        model.generate(ids[:, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
    seconds["generate_8_tokens"] = time.perf_counter() - began


def train_step(model: torch.nn.Module, ids: torch.Tensor, bf16: bool) -> float:
    """One step of LoRA on attention and all experts with gradient checkpointing; seconds."""
    began = time.perf_counter()
    peft_model = attach(model, lora_config(AdapterSettings(attention_rank=16, expert_rank=16))).train()  # type: ignore[arg-type]
    peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = peft_model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    return time.perf_counter() - began


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
