"""One LoRA training step at a given shape, on random weights: `python benchmarks/train_step.py --help`.

Trains LoRA on attention, dense MLP and experts with the router frozen and dropout 0; prints one JSON line last. Token
ids are fresh in every step: with repeated ones, groups of the same size hide what new sizes cost.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time

import torch

import lola_ft
from lola_ft.adapters import AdapterSettings, attach, lora_config
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.training.precision import choose_precision


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    precision = choose_precision("bfloat16", device)
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: the dense float32 model that it makes first must not count as this one's peak.
        child = multiprocessing.get_context("spawn").Process(target=write_base, args=(folder, args))
        child.start()
        child.join()
        assert child.exitcode == 0, "the random base was not written"
        quantization = None if args.quantization == "none" else args.quantization
        base = lola_ft.load_base(folder, quantization, precision.dtype, device, quiet=True)
    torch.manual_seed(0)
    ranks = AdapterSettings(attention_rank=args.rank, mlp_rank=args.rank, expert_rank=args.rank)
    model = attach(base, lora_config(ranks)).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds = []
    for step in range(args.warmup + args.steps):
        ids = torch.randint(6, args.vocab, (args.batch, args.seq), device=device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - began)
    step_s = statistics.median(seconds)
    print(
        json.dumps(
            {
                "tokens_per_s": round(args.batch * args.seq / step_s, 1),
                "step_s": round(step_s, 4),
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if device.type == "cuda" else 0,
                "trainable": sum(parameter.numel() for parameter in trained),
                "loss": round(value, 5),
                "dtype": str(precision.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "shape": {key: value for key, value in vars(args).items() if key not in ("steps", "warmup")},
            }
        )
    )


def write_base(folder: str, args: argparse.Namespace) -> None:
    """Write a random base in bfloat16."""
    torch.manual_seed(0)
    LolaForCausalLM(shape_of(args)).to(torch.bfloat16).save_pretrained(folder)


def shape_of(args: argparse.Namespace) -> LolaConfig:
    """The architecture to build, without dropout."""
    return LolaConfig(
        vocab_size=args.vocab,
        n_positions=max(args.seq, 64),
        n_embd=args.hidden,
        n_layer=args.layers,
        n_head=args.heads,
        n_inner=args.inner,
        num_experts=args.experts,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shape = {"layers": 8, "hidden": 512, "heads": 8, "inner": 2048, "experts": 16, "vocab": 16384}
    work = {"seq": 512, "batch": 4, "rank": 8, "steps": 4, "warmup": 2}
    for name, value in (shape | work).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    return parser.parse_args()


if __name__ == "__main__":
    main()
