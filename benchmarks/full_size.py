"""A base's exact shapes with random weights on this machine: load in NF4, generate a few tokens, train one step.

    python benchmarks/full_size.py [--source-dtype bfloat16|float32] [--folder DIR]
    python benchmarks/full_size.py --family olmoe|qwen3_moe [--layers 8] [--folder DIR]

LOLA needs 20 GB of disk for bfloat16 shards, 35 GB for float32. For the other families, see `full_size_families.py`.
Prints one JSON line last and removes what it wrote.
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from full_size_families import SHAPES, measure_family
from load import make_parser, measure_load, print_result
from memory import Peak

from lola_ft.adapters import AdapterSettings, add_adapter


def main() -> None:
    parser = make_parser(layers=24)
    parser.add_argument("--family", choices=("lola", *SHAPES), default="lola")
    parser.add_argument("--rank", type=int, default=8, help="of other families' adapter")
    parser.add_argument("--small", action="store_true", help="narrow layers of another family, to try the script")
    args = parser.parse_args()
    run = measure if args.family == "lola" else measure_family
    print_result(args, lambda folder: run(folder, args))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every stage and return the results."""
    model, result = measure_load(folder, args)
    from lola_ft.training.precision import choose_precision  # imported late: loading does not need the trainer

    compute_dtype = args.dtype
    if not choose_precision("bfloat16", torch.device("cpu")).bf16:
        compute_dtype = "float32"
        model.float()  # the dense weights: bfloat16 products are hundreds of times slower on this CPU
    compute(model, args, compute_dtype, result["memory_mb"], result["seconds"])
    return result | {"compute_dtype": compute_dtype}


def compute(
    model: torch.nn.Module,
    args: argparse.Namespace,
    compute_dtype: str,
    memory: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Run a forward, generate a few tokens and train a step; record memory and seconds."""
    ids = torch.randint(6, 100_000, (1, args.seq))
    with torch.no_grad(), Peak() as peak:
        began = time.perf_counter()
        model(ids[:, :64])
        seconds["forward_64_tokens"] = round(time.perf_counter() - began, 2)
        began = time.perf_counter()
        model.generate(ids[:, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
        seconds["generate_8_tokens"] = time.perf_counter() - began
    memory["forward"] = peak.result()
    with Peak() as peak:
        seconds["train_step"] = train_step(model, ids, compute_dtype)
    memory["train"] = peak.result()


def train_step(model: torch.nn.Module, ids: torch.Tensor, compute_dtype: str) -> float:
    """Return the seconds of one step of LoRA on attention and all experts with gradient checkpointing."""
    began = time.perf_counter()
    peft_model = add_adapter(model, AdapterSettings(attention_rank=16, expert_rank=16)).train()  # type: ignore[arg-type]
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


if __name__ == "__main__":
    main()
