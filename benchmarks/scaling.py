"""The growth of a training step's time with experts, rank and tokens: `python benchmarks/scaling.py --help`.

There are three series from the default shape of `train_step.py` with fewer layers: experts (at the same number of
tokens), rank, and tokens; and the step without LoRA on the experts. All models of a series take turns, so that a busy
machine slows all. Prints one JSON line last: median seconds, and each as a multiple of the first in its series.
"""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from train_step import parse, train_steps, with_adapter, write_base

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.training.precision import Precision, choose_precision

EXPERTS, RANKS, TOKENS = (16, 4, 64), (8, 16, 64), (256, 2048, 8192)


def main() -> None:
    args = parse(layers=4)
    device = torch.device(args.device)
    precision = choose_precision("bfloat16", device)
    result = {name: series(args, precision) for name, series in SERIES.items()}
    print(json.dumps(result | {"threads": torch.get_num_threads(), "shape": vars(args)}))


def experts_series(args: argparse.Namespace, precision: Precision) -> dict[str, dict[str, float]]:
    models = {str(count): model_of(args, precision, experts=count) for count in EXPERTS}
    return in_turn(models, args, precision)


def rank_series(args: argparse.Namespace, precision: Precision) -> dict[str, dict[str, float]]:
    return in_turn({str(rank): model_of(args, precision, rank=rank) for rank in RANKS}, args, precision)


def expert_lora(args: argparse.Namespace, precision: Precision) -> dict[str, dict[str, float]]:
    without = add_adapter(base_of(args, precision), AdapterSettings(attention_rank=8, mlp_rank=8)).train()
    return in_turn({"without": without, "with": model_of(args, precision)}, args, precision)


def tokens_series(args: argparse.Namespace, precision: Precision) -> dict[str, dict[str, float]]:
    """Return the seconds for 2048 tokens in several micro batch sizes."""
    model = model_of(args, precision)
    times: dict[str, list[float]] = {str(count): [] for count in TOKENS}
    for round_ in range(args.steps):
        for count in TOKENS:
            batch = max(1, count // args.seq)
            seconds = train_steps(model, batch, count // batch, int(round_ == 0), 1, precision)[0]
            times[str(count)] += [value * 2048 / count for value in seconds]
    return summary(times)


def in_turn(
    models: dict[str, PeftModel], args: argparse.Namespace, precision: Precision
) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(args.steps):
        for name, model in models.items():
            times[name] += train_steps(model, args.batch, args.seq, int(round_ == 0), 1, precision)[0]
    models.clear()
    gc.collect()
    return summary(times)


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    return {name: {"seconds": round(value, 3), "times": round(value / first, 3)} for name, value in medians.items()}


def model_of(args: argparse.Namespace, precision: Precision, experts: int = 16, rank: int = 8) -> PeftModel:
    return with_adapter(base_of(args, precision, experts), rank, args.checkpointing)


def base_of(args: argparse.Namespace, precision: Precision, experts: int = 16) -> lola_ft.model.LolaForCausalLM:
    shape = argparse.Namespace(**vars(args) | {"experts": experts})
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), shape)
        return lola_ft.load_base(folder, "nf4", precision.dtype, torch.device(args.device), quiet=True)


SERIES = {"experts": experts_series, "rank": rank_series, "tokens": tokens_series, "expert_lora": expert_lora}

if __name__ == "__main__":
    main()
