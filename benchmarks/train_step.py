"""One LoRA training step at a given shape, on random weights: `python benchmarks/train_step.py --help`.

Trains LoRA on attention, dense MLP and experts with a frozen router and without dropout. Prints one JSON line last. For
other families than LOLA, `--inner` is the experts' inner size. Token ids are new in every step, because repeated group
sizes would hide the cost of new ones.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from random_checkpoint import write_checkpoint

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.families import architecture_of
from lola_ft.memory import keep_freed_memory
from lola_ft.training.precision import Precision, choose_precision


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    precision = choose_precision("bfloat16", device)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args)
        quantization = None if args.quantization == "none" else args.quantization
        base = lola_ft.load_base(folder, quantization, precision.dtype, device, quiet=True)
    model = with_adapter(base, args.rank, args.checkpointing)
    seconds, loss = train_steps(model, args.batch, args.seq, args.warmup, args.steps, precision)
    step_s = statistics.median(seconds)
    print(
        json.dumps(
            {
                "tokens_per_s": round(args.batch * args.seq / step_s, 1),
                "step_s": round(step_s, 4),
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if device.type == "cuda" else 0,
                "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
                "loss": round(loss, 5),
                "dtype": str(precision.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "shape": {key: value for key, value in vars(args).items() if key not in ("steps", "warmup")},
            }
        )
    )


def write_base(folder: Path, args: argparse.Namespace) -> None:
    """Write a random base in bfloat16, in a separate process, so that its memory does not count in this one's peak."""
    sizes = {
        "vocab_size": args.vocab,
        "n_positions": max(args.seq, 64),
        "n_embd": args.hidden,
        "n_head": args.heads,
        "n_inner": args.inner,
        "num_experts": args.experts,
    }
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    named = sizes | (dropout if args.family == "lola" else {})
    named |= {} if args.top_k is None else {"topk": args.top_k}
    given = (folder, torch.bfloat16, args.layers, args.family)
    child = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=given, kwargs=named)
    child.start()
    child.join()
    assert child.exitcode == 0, "the random base was not written"


def with_adapter(base: Any, rank: int, checkpointing: bool) -> PeftModel:
    """Add LoRA to attention, dense MLP, shared experts and experts, as far as the base has them, ready to train."""
    torch.manual_seed(0)
    has = architecture_of(base.config).features
    ranks = AdapterSettings(
        attention_rank=rank,
        mlp_rank=rank if "mlp" in has else None,
        shared_rank=rank if "shared_experts" in has else None,
        expert_rank=rank if "experts" in has else None,
    )
    model = add_adapter(base, ranks).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def train_steps(
    model: PeftModel, batch: int, seq: int, warmup: int, steps: int, precision: Precision
) -> tuple[list[float], float]:
    """Return the seconds of each step after the warm-up, and the last loss."""
    keep_freed_memory()  # like a run
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    seconds, loss_value = [], 0.0
    for step in range(warmup + steps):
        ids = torch.randint(6, model.config.vocab_size, (batch, seq), device=model.device)
        began = time.perf_counter()
        loss_value = one_step(model, optimizer, {"input_ids": ids, "labels": ids}, precision)
        if step >= warmup:
            seconds.append(time.perf_counter() - began)
    return seconds, loss_value


def one_step(
    model: PeftModel, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor], precision: Precision
) -> float:
    """Train on one micro batch, and return its loss."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision.bf16):
        loss = model(**inputs, use_cache=False, skip_logits=True).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()  # waits for a GPU


def parse(**defaults: int) -> argparse.Namespace:
    return make_parser(**defaults).parse_args()


def make_parser(**defaults: int) -> argparse.ArgumentParser:
    """Return the parser of the command line, which other benchmarks use with other defaults."""
    about = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shape = {"layers": 8, "hidden": 512, "heads": 8, "inner": 2048, "experts": 16, "vocab": 16384}
    work = {"seq": 512, "batch": 4, "rank": 8, "steps": 4, "warmup": 2}
    for name, value in (shape | work | defaults).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--family", default="lola", help="lola, or a model type such as olmoe or mixtral")
    parser.add_argument("--top-k", type=int, help="experts per token; the family's default if left out")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    return parser


if __name__ == "__main__":
    main()
