"""LOLA and a top-8 family at full shape on a GPU: `python benchmarks/gpu.py`, within eight minutes.

Random weights, NF4, LoRA of rank 16 on attention, dense MLP and all experts, 2048 tokens per row. Each part runs in its
own process: if a kernel fails, or leaves the GPU unusable, only that part is lost. It prints the reason, and the next
part begins. Before anything is timed, its numbers are compared with the plain path, one expert after another: outputs
and gradients of an MoE layer for each way of multiplying, and a loss of the model. A way that fails is not used by the
model.

Prints one JSON line after each part; then whether the figures that were asked for are reached; and all of it in one
line last. `--dry` prints only the list of parts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decode import decode
from random_checkpoint import config_of, write_checkpoint
from torch import Tensor, nn
from train_step import train_steps, with_adapter

import lola_ft
from lola_ft.families import architecture_of
from lola_ft.kernels import choose_products, experts
from lola_ft.kernels.loop_products import LoopProducts
from lola_ft.kernels.products import GroupedMatmuls, Products
from lola_ft.kernels.stacks import LowRank
from lola_ft.quantization import NF4Experts
from lola_ft.quantization.load import CAUSAL_LM, _build
from lola_ft.training.precision import choose_precision

_RANK = 16
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
_SHAPES = {"olmoe": {"n_inner": 1024}}  # where the Hub's config differs from transformers' default
_TRITON = "triton"
# Columns of a tile, depth, warps, stages; plain "triton" has the chip's launch settings.
_WAYS = ("grouped", _TRITON, "triton 128x64x4x3", "triton 256x64x8x3", "triton 128x128x8x2", "triton 64x64x4x4")
_WRONG = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest error allowed against the plain path, as a share of a tensor's norm: half precision rounds every step."""
_MINUTES, _LAYER_SECONDS, _MODEL_SECONDS, _LEAST_SECONDS = 8, 60, 220, 10
ASKED: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "LOLA, micro batch 8: at least 0.45 of the matmul rate": (
        ("lola model", "train_8_recomputed", "share_of_matmul_rate"),
        lambda share: share >= 0.45,
    ),
    "LOLA, micro batch 1: at most 6.5 GB": (("lola model", "train_1_recomputed", "peak_gb"), lambda gb: gb <= 6.5),
    "LOLA, one token at a time: at least 100 tokens/s": (
        ("lola model", "decode_tokens_per_s"),
        lambda tokens: tokens >= 100,
    ),
}

Found = dict[str, Any]


def main() -> None:
    args = parse()
    if args.part:
        run_part(args)
        return
    result: Found = {}
    began = time.perf_counter()
    for name, arguments, limit in parts(args, result):
        if args.dry:
            print(json.dumps({name: arguments, "limit_s": limit}))
            continue
        left = 60 * args.minutes - (time.perf_counter() - began)
        if left < _LEAST_SECONDS:
            result[name] = {"error": "no time was left"}
        else:
            result[name] = in_process(
                [sys.executable, __file__, *passed_on(args), *arguments], min(limit * args.minutes / _MINUTES, left)
            )
        so_far = round(time.perf_counter() - began, 1)
        print(json.dumps({name: result[name], "seconds_so_far": so_far}), flush=True)
    if not args.dry:
        for line in asked(result):
            print(line)
        print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 1), "shape": vars(args)}))


def parts(args: argparse.Namespace, result: Found) -> Iterator[tuple[str, list[str], int]]:
    """Yield name, arguments and limit in seconds of each part, in order.

    Args:
        result: Results of earlier parts by name, on which later parts depend.
    """
    yield "device", ["--part", "device"], _LAYER_SECONDS
    rate = result.get("device", {}).get("matmul_flops", 0)
    for family in args.families:
        ways = _WAYS if args.device == "cuda" else ("grouped",)
        for way in ways:
            yield f"{family} layer, {way}", ["--part", "layer", "--family", family, "--way", way], _LAYER_SECONDS
        failed = [way for way in ("grouped", _TRITON) if "error" in result.get(f"{family} layer, {way}", {})]
        arguments = ["--part", "model", "--family", family, "--rate", str(rate), "--without", *failed]
        yield f"{family} model", arguments, _MODEL_SECONDS


def in_process(command: list[str], limit: float) -> Found:
    """Run a part, and return what it printed (one JSON object per line), with the reason as `error` if it failed."""
    found: Found = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=limit, check=False).returncode
            error = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            error = f"took longer than {limit:.0f} s"
        out.seek(0)
        err.seek(0)
        for line in out:
            if line.startswith("{"):
                found |= json.loads(line)
        said = err.read().strip().splitlines()
    if error:
        found["error"] = f"{error}: {said[-1][:200]}" if said else error
    return found


def passed_on(args: argparse.Namespace) -> list[str]:
    """Return the options that are passed on to parts."""
    names = ("layers", "hidden", "heads", "inner", "vocab", "seq", "steps", "decode", "ceiling", "device")
    given = [text for name in names if (value := getattr(args, name)) is not None for text in (f"--{name}", str(value))]
    return [*given, "--tokens", *map(str, args.tokens)]


def asked(result: Found) -> Iterator[str]:
    """Yield a line for each figure that was asked for: whether it was reached, and its value."""
    for text, (keys, reached) in ASKED.items():
        value: Any = result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            yield f"{text}: not measured"
        else:
            yield f"{text}: {'yes' if reached(value) else 'no'}, {value}"


# The parts, each in its own process


def run_part(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    precision = choose_precision("bfloat16", device)
    if args.part == "device":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        rate = matmul_rate(device, precision.dtype, args.ceiling)
        say(name=name, matmul_tflops=round(rate / 1e12, 1), matmul_flops=rate)
    elif args.part == "layer":
        layer = random_layer(args, device, precision.dtype)
        for tokens in args.tokens:
            for name, value in compare_way(*layer, args.way, tokens, precision.dtype).items():
                say(**{f"{name}_{tokens}": value})
    else:
        model_part(args, device, precision)


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def random_layer(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[NF4Experts, int]:
    """Return the experts of one MoE layer with random weights, and the number of experts per token."""
    architecture = architecture_of(config_of(args.family, n_layer=2, **sizes_of(args)))
    model = _build(architecture, CAUSAL_LM, "nf4", dtype, device)
    layer = next(module for module in model.modules() if isinstance(module, NF4Experts))
    generator = torch.Generator(device).manual_seed(0)
    for part in layer.parts:
        for e in range(layer.num_experts):
            weight = torch.randn(layer.part_shape(part), generator=generator, device=device, dtype=torch.float32)
            layer.load_expert(part, e, weight * 0.02)
    for name, bias in list(layer.named_parameters()):
        if name.endswith("_bias"):
            setattr(layer, name, nn.Parameter(torch.zeros(bias.shape, device=device, dtype=dtype), requires_grad=False))
    return layer, architecture.sizes.top_k or 1


def compare_way(layer: NF4Experts, top_k: int, way: str, tokens: int, dtype: torch.dtype) -> Found:
    """Return the error of a way of multiplying and its milliseconds; for "grouped" also those of the plain path.

    Raises:
        SystemExit: If the error is too large.
    """
    products = way_of(way)
    plain, got = (
        outcome(layer, top_k, chosen, min(tokens, 512), in_dtype)
        for chosen, in_dtype in ((LoopProducts(), torch.float32), (products, dtype))
    )
    error = largest_error(got, plain)
    if error > _WRONG[dtype]:
        raise SystemExit(f"{way}: wrong numbers, {error:.3g} off the plain path")
    found: Found = {"error_of_length": round(error, 6), "ms": milliseconds(layer, top_k, products, tokens, dtype)}
    if way == "grouped":
        found["plain_ms"] = milliseconds(layer, top_k, LoopProducts(), tokens, dtype)
    return found


def way_of(name: str) -> Products:
    if name == "grouped":
        return GroupedMatmuls()
    from lola_ft.kernels.launch_settings import Launch
    from lola_ft.kernels.triton_products import TritonProducts

    _, _, numbers = name.partition(" ")
    return TritonProducts(Launch(*map(int, numbers.split("x"))) if numbers else None)


def outcome(layer: NF4Experts, top_k: int, products: Products, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of a layer with LoRA."""
    run, leaves = pass_of(layer, top_k, products, tokens, dtype)
    out = run()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def pass_of(
    layer: NF4Experts, top_k: int, products: Products, tokens: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a forward pass of a layer with LoRA, the same for every dtype, and its leaves that get gradients."""
    generator, device = torch.Generator().manual_seed(0), layer.absmax_code.device

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    x = random(tokens, layer.hidden_size)
    probs = torch.rand(tokens, top_k, generator=generator).to(device, dtype).requires_grad_()
    scores = torch.rand(tokens, layer.num_experts, generator=generator)
    ids = scores.topk(top_k, dim=-1).indices.to(device)
    paths, leaves = {}, [x, probs]
    for name, (inputs, outputs) in layer.shapes.items():
        a = random(layer.num_experts, _RANK, inputs, scale=0.02)
        b = random(layer.num_experts, outputs, _RANK, scale=0.02)
        paths[name] = LowRank(a, b)
        leaves += [a, b]
    return lambda: experts.run_experts(layer, x, ids, probs, paths, products), leaves


def largest_error(got: list[Tensor], plain: list[Tensor]) -> float:
    """Return the largest difference between two lists of tensors, each as a share of the norm of `plain`'s tensor."""
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, plain, strict=True))


def milliseconds(
    layer: NF4Experts, top_k: int, products: Products, tokens: int, dtype: torch.dtype, rounds: int = 5
) -> float:
    """Return the median milliseconds of a forward and backward pass."""
    run, _ = pass_of(layer, top_k, products, tokens, dtype)
    times = []
    for _ in range(rounds + 2):
        synchronize()
        began = time.perf_counter()
        run().sum().backward()
        synchronize()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times[2:]) * 1000, 3)


def model_part(args: argparse.Namespace, device: torch.device, precision: Any) -> None:
    """Measure loading, decoding and training at several micro batches; check a loss against the plain path."""
    leave_out(args.without)
    with tempfile.TemporaryDirectory() as folder:
        sizes = sizes_of(args) | {"n_positions": max(args.seq, 256)}
        dropout = _NO_DROPOUT if args.family == "lola" else {}
        layers = args.layers or config_of(args.family).num_hidden_layers
        write_checkpoint(Path(folder), torch.bfloat16, layers, args.family, **sizes, **dropout)
        began = time.perf_counter()
        base = lola_ft.load_base(folder, "nf4", precision.dtype, device, quiet=True)
        say(load={"seconds": round(time.perf_counter() - began, 1), "gb": allocated(device)})
    check_loss(base, args.seq, precision.dtype)
    say(decode_tokens_per_s=round(1 / statistics.median(decode(base, 128, args.decode) for _ in range(3)), 1))
    flops = 4 * architecture_of(base.config).active_parameters  # per token: forward, and the gradients of inputs
    for batch, checkpointing in ((1, False), (1, True), (8, True)):
        model = with_adapter(base, _RANK, checkpointing)
        name = f"train_{batch}_{'recomputed' if checkpointing else 'kept'}"
        say(**{name: training(model, batch, args, precision, flops)})
        base = model.unload()
        base.gradient_checkpointing_disable()
    say(chosen=choose_products.chosen())


def leave_out(failed: list[str]) -> None:
    """Keep the model from using the ways of multiplying that failed."""
    if _TRITON in failed:
        choose_products._fused = lambda: None  # type: ignore[assignment]
    if "grouped" in failed:
        plain: Any = LoopProducts()
        experts.choose_products = lambda *_: plain if _TRITON in failed else way_of(_TRITON)


@torch.no_grad()
def check_loss(base: Any, seq: int, dtype: torch.dtype) -> None:
    """Compare the loss of some tokens with the plain path's.

    Raises:
        SystemExit: If the difference is too large.
    """
    ids = torch.randint(6, base.config.vocab_size, (1, min(seq, 256)), device=base.device)
    loss = base(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.item()
    choose, plain = experts.choose_products, LoopProducts()
    experts.choose_products = lambda *_: plain
    expected = base(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.item()
    experts.choose_products = choose
    say(loss={"chosen": round(loss, 5), "plain": round(expected, 5)})
    if not abs(loss - expected) <= _WRONG[dtype] * abs(expected):
        raise SystemExit(f"the loss is {loss:.4f}, but {expected:.4f} in the plain path")


def training(model: Any, batch: int, args: argparse.Namespace, precision: Any, flops: int) -> Found:
    """Return speed and memory of training steps, or a message if the memory is too small."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, loss = train_steps(model, batch, args.seq, 3, args.steps, precision)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    tokens_per_s = batch * args.seq / statistics.median(seconds)
    share = {"share_of_matmul_rate": round(tokens_per_s * flops / args.rate, 4)} if args.rate else {}
    return {"tokens_per_s": round(tokens_per_s, 1), **share, "peak_gb": peak(model.device), "loss": round(loss, 4)}


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


def sizes_of(args: argparse.Namespace) -> dict[str, int]:
    """Return the given sizes by the names of LOLA's config. The others stay those of the base on the Hub."""
    names = {"n_embd": args.hidden, "n_inner": args.inner, "n_head": args.heads, "vocab_size": args.vocab}
    return _SHAPES.get(args.family, {}) | {name: size for name, size in names.items() if size is not None}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated(device: torch.device) -> float:
    return round(torch.cuda.memory_allocated() / 1e9, 3) if device.type == "cuda" else 0.0


def peak(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if device.type == "cuda" else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["lola", "olmoe"])
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all parts; later ones are skipped (8)")
    parser.add_argument("--dry", action="store_true", help="print the parts and run none")
    for name in ("layers", "hidden", "heads", "inner", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the family's own")
    for name, value in {"seq": 2048, "steps": 5, "decode": 64, "ceiling": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--tokens", type=int, nargs="+", default=(2048, 16384), help="rows of the MoE layer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    own = parser.add_argument_group("options of one part, which runs in its own process")
    own.add_argument("--part", choices=("device", "layer", "model"))
    own.add_argument("--family", default="lola")
    own.add_argument("--way", default="grouped")
    own.add_argument("--rate", type=float, default=0.0, help="of matmuls, FLOPs per second")
    own.add_argument("--without", nargs="*", default=[], help="ways of multiplying that failed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
