"""A LoRA training step of other mixtures of experts, and of the stock stack: `python benchmarks/families.py --help`.

The stock stack is transformers' own model with PEFT's `target_parameters`, with each of transformers' ways to run
experts that fits into memory. Its experts are not in 4 bit, because bitsandbytes does not quantise fused experts. They
are in bfloat16 if the processor has units for it, else in float32. lola_ft uses the 4-bit base. Both train LoRA of one
rank on attention and experts, each in its own process, in turns (`turns.py`).

Second comparison: lola_ft with k experts per token, and with one expert that is k times as wide. Both have the same
number of parameters and of active parameters.

Memory is the largest resident memory including loading: in total, and above the memory after the imports. Prints one
JSON line last.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from train_step import make_parser, write_base
from transformers import AutoModelForCausalLM
from turns import MakeStep, Step, in_turns
from whole_step import ours

from lola_ft.training.precision import choose_precision

SHAPES = {
    "olmoe": {"experts": 64, "top_k": 8, "inner": 256},
    "mixtral": {"experts": 16, "top_k": 2, "inner": 1024},
}
WANTED = {"times_faster": 2.0, "share_of_their_memory": 0.4, "top_k_against_top_1": 1.5}


def main() -> None:
    parser = make_parser(steps=5)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    result: dict[str, Any] = {family: beside_stock(family, args) for family in args.families}
    result["top_k_against_top_1"] = against_top_1(args)
    result |= {
        "wanted": WANTED,
        "stock_holds_experts_in": str(precision_of(args).dtype).removeprefix("torch."),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def beside_stock(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second and memory of lola_ft and the stock ways, and ratios to the fastest stock way."""
    shaped = with_shape(args, family, **SHAPES[family])
    fits, left_out = stock_ways(shaped)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), shaped)
        ways: dict[str, MakeStep] = {"ours": partial(ours, folder, shaped)}
        ways |= {name: partial(stock, folder, shaped, name) for name in fits}
        seconds, found = in_turns(ways, args.steps, args.warmup)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(fits, key=medians.__getitem__)
    faster = statistics.median(theirs / own for theirs, own in zip(seconds[best], seconds["ours"], strict=True))
    measured = "gpu" if args.device == "cuda" else "whole"
    peak = {name: figures[measured] for name, figures in found.items()}
    above = {name: figures["whole"] - figures["after_imports"] for name, figures in found.items()}
    return {
        "shape": SHAPES[family],
        "tokens_per_s": {name: round(args.batch * args.seq / value, 1) for name, value in medians.items()},
        "best_stock_way": best,
        "left_out": left_out,
        "times_faster": round(faster, 2),
        "cpu_s_per_step": {name: figures["cpu_s"] for name, figures in found.items()},
        "peak_mb": peak,
        "peak_above_imports_mb": {name: round(value, 1) for name, value in above.items()},
        "share_of_their_memory": {
            "whole": round(peak["ours"] / peak[best], 2),
            "above_imports": round(above["ours"] / above[best], 2),
        },
    }


def against_top_1(args: argparse.Namespace) -> dict[str, Any]:
    """Return the time of a step with k experts per token, as a multiple of that with one expert k times as wide."""
    many = with_shape(args, "olmoe", **SHAPES["olmoe"])
    one = with_shape(args, "olmoe", experts=many.experts // many.top_k, top_k=1, inner=many.inner * many.top_k)
    with tempfile.TemporaryDirectory() as folder:
        ways = {}
        for name, shaped in (("top_k", many), ("top_1", one)):
            write_base(Path(folder) / name, shaped)
            ways[name] = partial(ours, f"{folder}/{name}", shaped)
        seconds, found = in_turns(ways, args.steps, args.warmup)
    ratio = statistics.median(k / single for k, single in zip(seconds["top_k"], seconds["top_1"], strict=True))
    return {
        "shapes": {
            name: {key: getattr(shaped, key) for key in ("experts", "top_k", "inner")}
            for name, shaped in (("top_k", many), ("top_1", one))
        },
        "tokens_per_s": {
            name: round(args.batch * args.seq / statistics.median(values), 1) for name, values in seconds.items()
        },
        "cpu_s_per_step": {name: figures["cpu_s"] for name, figures in found.items()},
        "times": round(ratio, 2),
    }


def stock_ways(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return transformers' ways to run experts, and the reasons for those left out (one copies weights per choice)."""
    choices = args.batch * args.seq * args.top_k
    layer = choices * 3 * args.hidden * args.inner * precision_of(args).dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else psutil.virtual_memory().available
    needed = layer * args.layers  # backward needs the copies of every layer
    if needed < free / 2:
        return ["grouped_mm", "eager", "batched_mm"], {}
    reason = f"would hold {needed / 1e9:.0f} GB of copied weights for backward; {free / 1e9:.0f} GB are free"
    return ["grouped_mm", "eager"], {"batched_mm": reason}


def stock(folder: str, args: argparse.Namespace, experts_implementation: str) -> Step:
    """Load transformers' model with PEFT's LoRA on attention and experts, and return its step."""
    dtype = precision_of(args).dtype
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=args.device, experts_implementation=experts_implementation
    )
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).train()
    return lambda: stock_step(model, args)


def stock_step(model: PeftModel, args: argparse.Namespace) -> float:
    """Return the seconds of one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(6, model.config.vocab_size, (args.batch, args.seq), device=model.device)
    began = time.perf_counter()
    with torch.autocast(args.device, torch.bfloat16, enabled=precision_of(args).bf16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - began


def with_shape(args: argparse.Namespace, family: str, experts: int, top_k: int, inner: int) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"family": family, "experts": experts, "top_k": top_k, "inner": inner})


def precision_of(args: argparse.Namespace) -> Any:
    return choose_precision("bfloat16", torch.device(args.device))


if __name__ == "__main__":
    main()
