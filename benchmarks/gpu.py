"""LOLA at its full shape on a GPU: `python benchmarks/gpu.py`, less than eight minutes on an H200.

Random weights, NF4, LoRA of rank 16 on attention, dense MLP and all experts, 2048 tokens per row. The parts are: the
device's own matmul rate; loading; one MoE layer with each way of multiplying; training at several micro batches, with
the active FLOPs as a share of the matmul rate; decoding. Prints one JSON line after each part, and all of them in one
line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decode import decode
from random_checkpoint import write_checkpoint
from train_step import train_steps, with_adapter

import lola_ft
from lola_ft.kernels import choose_products
from lola_ft.kernels.experts import run_experts
from lola_ft.kernels.loop_products import LoopProducts
from lola_ft.kernels.products import GroupedMatmuls
from lola_ft.kernels.stacks import LowRank
from lola_ft.model import LolaForCausalLM
from lola_ft.training.precision import choose_precision

_RANK = 16
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    result: dict[str, Any] = {}
    began = time.perf_counter()
    for name, part in parts(args, device):
        result[name] = part
        print(json.dumps({name: part, "seconds_so_far": round(time.perf_counter() - began, 1)}), flush=True)
    print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 1), "shape": vars(args)}))


def parts(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yield name and numbers of each part, in order."""
    precision = choose_precision("bfloat16", device)
    yield "device", torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rate = matmul_rate(device, precision.dtype, args.ceiling)
    yield "matmul_tflops", round(rate / 1e12, 1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"n_embd": args.hidden, "n_inner": args.inner, "n_head": args.heads, "vocab_size": args.vocab}
        write_checkpoint(
            Path(folder), torch.bfloat16, args.layers, n_positions=max(args.seq, 256), **sizes, **_NO_DROPOUT
        )
        began = time.perf_counter()
        base = lola_ft.load_base(folder, "nf4", precision.dtype, device, quiet=True)
        yield "load", {"seconds": round(time.perf_counter() - began, 1), "gb": allocated(device)}
    for tokens in args.tokens:
        yield f"moe_layer_{tokens}", moe_layer(base, tokens, precision.dtype)
    yield "decode_tokens_per_s", round(1 / statistics.median(decode(base, 128, args.decode) for _ in range(3)), 1)
    flops = active_flops(base)
    for batch, checkpointing in ((1, False), (1, True), (8, True)):
        model = with_adapter(base, _RANK, checkpointing)
        yield (
            f"train_{batch}_{'recomputed' if checkpointing else 'kept'}",
            training(model, batch, args, precision, flops, rate),
        )
        base = model.unload()
        base.gradient_checkpointing_disable()
    yield "chosen", choose_products.chosen()


def training(
    model: Any, batch: int, args: argparse.Namespace, precision: Any, flops: int, rate: float
) -> dict[str, float | str]:
    """Return speed and memory of training steps, or a message if the memory is too small."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, loss = train_steps(model, batch, args.seq, 3, args.steps, precision)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    tokens_per_s = batch * args.seq / statistics.median(seconds)
    return {
        "tokens_per_s": round(tokens_per_s, 1),
        "share_of_matmul_rate": round(tokens_per_s * flops / rate, 4),
        "peak_gb": peak(model.device),
        "loss": round(loss, 4),
    }


def moe_layer(base: LolaForCausalLM, tokens: int, dtype: torch.dtype) -> dict[str, float | str]:
    """Return the milliseconds of the first MoE layer, forward and backward with LoRA, for each way of multiplying."""
    experts, device = base.transformer.h[1].moe.experts, base.device
    torch.manual_seed(0)
    x = torch.randn(tokens, base.config.n_embd, device=device, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, experts.num_experts, (tokens, 1), device=device)
    probs = torch.rand(tokens, 1, device=device)
    paths = {}
    for name, (inputs, outputs) in experts.shapes.items():
        a = torch.randn(experts.num_experts, _RANK, inputs, device=device, dtype=dtype) * 0.02
        b = torch.randn(experts.num_experts, outputs, _RANK, device=device, dtype=dtype) * 0.02
        paths[name] = LowRank(a.requires_grad_(), b.requires_grad_())
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "loop": with_products(LoopProducts()),
        "grouped": with_products(GroupedMatmuls()),
    }
    if device.type == "cuda":
        from lola_ft.kernels.triton_products import TritonProducts

        for block_n, block_k, warps, stages in ((128, 64, 8, 3), (128, 64, 4, 3), (256, 64, 8, 3), (128, 128, 8, 2)):
            name = f"triton {block_n}x{block_k}, {warps} warps, {stages} stages"
            ways[name] = with_products(TritonProducts(block_n, block_k, warps, stages))
    return {
        name: milliseconds(lambda way=way: way(experts, x, ids, probs.to(dtype), paths)) for name, way in ways.items()
    }


def with_products(products: Any) -> Callable[..., torch.Tensor]:
    return lambda *given: run_experts(*given, products=products)


def milliseconds(run: Callable[[], torch.Tensor], rounds: int = 5) -> float | str:
    """Return the median milliseconds of a forward and backward, or the reason why it does not run."""
    times = []
    try:
        for _ in range(rounds + 2):
            synchronize()
            began = time.perf_counter()
            run().sum().backward()
            synchronize()
            times.append(time.perf_counter() - began)
    except Exception as error:  # from a compiler or a kernel; the other ways can still be measured
        return str(error).splitlines()[0][:200]
    return round(statistics.median(times[2:]) * 1000, 3)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOPs per second of a square matmul, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def active_flops(base: LolaForCausalLM) -> int:
    """Return the FLOPs per trained token: each weight that it uses, once forward and once for its input's gradient."""
    config = base.config
    attention, mlp = 4 * config.n_embd**2, 2 * config.n_embd * config.n_inner
    weights = config.n_layer * (attention + mlp) + config.n_embd * config.vocab_size
    return 2 * 2 * weights


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated(device: torch.device) -> float:
    return round(torch.cuda.memory_allocated() / 1e9, 3) if device.type == "cuda" else 0.0


def peak(device: torch.device) -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if device.type == "cuda" else 0.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shape = {"layers": 24, "hidden": 2048, "heads": 16, "inner": 8192, "vocab": 100096, "seq": 2048}
    for name, value in (shape | {"steps": 5, "decode": 64, "ceiling": 8192}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=(2048, 16384), help="rows of the MoE layer alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
