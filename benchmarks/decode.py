"""Seconds to decode one token with 16 experts per layer and with 64: `python benchmarks/decode.py --help`.

Each token uses one expert, so the number of experts should not matter. Both models are in NF4 and have random weights.
They take turns, so that a busy machine slows both. Prints one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from transformers import DynamicCache

import lola_ft
from lola_ft.model import LolaConfig, LolaForCausalLM


def main() -> None:
    args = parse()
    models = {experts: make_model(args, experts) for experts in args.experts}
    seconds: dict[int, list[float]] = {experts: [] for experts in models}
    for _ in range(args.rounds + 1):
        for experts, model in models.items():
            seconds[experts].append(decode(model, args.prompt, args.tokens))
    medians = {experts: statistics.median(rounds[1:]) for experts, rounds in seconds.items()}  # the first one warms up
    few, many = args.experts
    print(
        json.dumps(
            {
                "seconds_a_token": {experts: round(value, 5) for experts, value in medians.items()},
                "ratio": round(medians[many] / medians[few], 3),
                "threads": torch.get_num_threads(),
                "shape": vars(args),
            }
        )
    )


def make_model(args: argparse.Namespace, experts: int) -> LolaForCausalLM:
    """Return a random model in 4 bit."""
    torch.manual_seed(0)
    config = LolaConfig(
        vocab_size=args.vocab, n_embd=args.hidden, n_layer=args.layers, n_head=args.heads, num_experts=experts
    )
    with tempfile.TemporaryDirectory() as folder:
        LolaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        return lola_ft.load_base(folder, "nf4", "float32", args.device, quiet=True)


@torch.no_grad()
def decode(model: LolaForCausalLM, prompt: int, tokens: int) -> float:
    """Return the mean seconds per token after a prompt of random ids, which use all experts."""
    device = model.device
    cache = DynamicCache(config=model.config)
    model(torch.randint(6, model.config.vocab_size, (1, prompt), device=device), past_key_values=cache)
    ids = torch.randint(6, model.config.vocab_size, (tokens, 1, 1), device=device)
    began = time.perf_counter()
    for token in ids:
        logits = model(token, past_key_values=cache).logits
    logits.sum().item()  # waits for a GPU
    return (time.perf_counter() - began) / tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = {"layers": 4, "hidden": 1024, "heads": 8, "vocab": 4096, "prompt": 32, "tokens": 16, "rounds": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--experts", type=int, nargs=2, default=(16, 64), metavar=("FEW", "MANY"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
