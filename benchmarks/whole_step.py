"""A training step with lola_ft and in the common way, in turns: `python benchmarks/whole_step.py --help`.

The common way is `per_expert.py`: one module per expert, bitsandbytes' layers, PEFT, eager attention, full logits. Both
train LoRA on the same random base, each in its own process, so that they do not influence each other (kernels of the
matrix library, memory). Their steps take turns. Memory is the largest in the steps. Prints one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from per_expert import per_expert_model
from train_step import parse, train_steps, with_adapter, write_base
from turns import Step, in_turns

import lola_ft
from lola_ft.training.precision import choose_precision


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args)
        ways = {"ours": partial(ours, folder, args), "common": partial(common, folder, args)}
        times, found = in_turns(ways, args.steps, args.warmup)
    memory = {name: figures["steps_anonymous"] for name, figures in found.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    faster = statistics.median(c / o for c, o in zip(times["common"], times["ours"], strict=True))
    print(
        json.dumps(
            {
                "tokens_per_s": {name: round(args.batch * args.seq / value, 1) for name, value in medians.items()},
                "times_faster": round(faster, 2),
                "peak_anonymous_mb": memory,
                "share_of_their_memory": round(memory["ours"] / memory["common"], 2),
                "dtype": str(choose_precision("bfloat16", torch.device(args.device)).dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            }
        )
    )


def ours(folder: str, args: argparse.Namespace) -> Step:
    device, precision = torch.device(args.device), choose_precision("bfloat16", torch.device(args.device))
    base = lola_ft.load_base(folder, quantization_of(args), precision.dtype, device, quiet=True)
    model = with_adapter(base, args.rank, args.checkpointing)
    return lambda: train_steps(model, args.batch, args.seq, 0, 1, precision)[0][0]


def common(folder: str, args: argparse.Namespace) -> Step:
    device, precision = torch.device(args.device), choose_precision("bfloat16", torch.device(args.device))
    dense = lola_ft.load_base(folder, None, precision.dtype, device, quiet=True)
    model = per_expert_model(dense, args.rank, quantization_of(args) is not None)
    return lambda: common_step(model, args.batch, args.seq)


def common_step(model: PeftModel, batch: int, seq: int) -> float:
    """Return the seconds of one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(6, model.config.vocab_size, (batch, seq), device=model.device)
    began = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - began


def quantization_of(args: argparse.Namespace) -> str | None:
    return None if args.quantization == "none" else args.quantization


if __name__ == "__main__":
    main()
