"""One MoE layer with LoRA, forward and backward, in several ways in turns: `python benchmarks/experts.py --help`.

The ways: lola_ft on 4-bit weights; lola_ft on dense weights (the lower bound, without dequantising); a Python loop over
bitsandbytes' layers with PEFT's LoRA; PEFT's own wrapper of 3-D parameters, which builds `W + BA`. Choices of experts
are new in every round, because repeated group sizes would hide the cost of new ones. Prints one JSON line last: median
milliseconds, and each as a multiple of lola_ft's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from per_expert import PerExpert, lora_of
from torch import Tensor, nn

from lola_ft.kernels.stacks import LowRank
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts
from lola_ft.training.precision import choose_precision

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    dtype = choose_precision("bfloat16", device).dtype
    torch.manual_seed(0)
    dense = make_dense(args, device, dtype)
    ways = {
        "ours": ours(quantise(dense), args.rank),
        "ours, dense weights": ours(dense, args.rank),
        "loop over bitsandbytes layers": loop(dense, args.rank),
        "PEFT's wrapper, dense weights": wrapped(dense, args.rank),
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + args.warmup):
        x = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype)
        ids, probs = torch.randint(0, args.experts, (args.tokens, 1), device=device), torch.rand(args.tokens, 1)
        for name, way in ways.items():
            spent = once(way, x, ids, probs.to(x))
            if round_ >= args.warmup:
                milliseconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    print(
        json.dumps(
            {
                "milliseconds": {name: round(value, 2) for name, value in medians.items()},
                "times_ours": {name: round(value / medians["ours"], 2) for name, value in medians.items()},
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "shape": vars(args),
            }
        )
    )


def once(way: Way, x: Tensor, ids: Tensor, probs: Tensor) -> float:
    """Return the milliseconds of a forward and backward."""
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    began = time.perf_counter()
    out = way(x, ids, probs)
    out.backward(torch.ones_like(out))
    if x.grad is not None:
        x.grad.sum().item()  # waits for a GPU
    return (time.perf_counter() - began) * 1000


def make_dense(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> FusedExperts:
    experts = FusedExperts(args.hidden, args.inner, args.experts).to(device, dtype).requires_grad_(False)
    for name, parameter in experts.named_parameters():
        parameter.data.zero_() if name.endswith("bias") else parameter.data.normal_(std=0.02)
    return experts


def quantise(dense: FusedExperts) -> NF4Experts:
    experts = NF4Experts(**dense.settings)
    experts.allocate(dense.up_proj.device)
    for name in dense.shapes:
        for e in range(dense.num_experts):
            experts.load_expert(name, e, getattr(dense, name)[e])
        setattr(experts, f"{name}_bias", getattr(dense, f"{name}_bias"))
    return experts


def ours(experts: FusedExperts, rank: int) -> Way:
    paths = {}
    for name, (inputs, outputs) in experts.shapes.items():
        like = experts.up_proj_bias
        a = torch.randn(experts.num_experts, rank, inputs).to(like) * 0.02
        b = torch.randn(experts.num_experts, outputs, rank).to(like) * 0.02
        paths[name] = LowRank(a.requires_grad_(), b.requires_grad_())
    return lambda x, ids, probs: experts(x, ids, probs, paths)


def loop(dense: FusedExperts, rank: int) -> Way:
    model = nn.Module()
    model.experts = PerExpert(dense, quantised=True)
    return get_peft_model(model, lora_of(rank)).train().base_model.model.experts


def wrapped(dense: FusedExperts, rank: int) -> Way:
    model = nn.Module()
    model.experts = dense
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=["experts.up_proj", "experts.down_proj"])
    return get_peft_model(model, config).train().base_model.model.experts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 2048, "hidden": 512, "inner": 2048, "experts": 16, "rank": 8, "rounds": 7, "warmup": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
