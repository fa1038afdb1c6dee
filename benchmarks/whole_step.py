"""A training step by the common way and by ours, in turn: `python benchmarks/whole_step.py --help`.

The common way is `per_expert.py`: a module an expert, bitsandbytes' layers, PEFT, eager attention, full logits. Both
train LoRA on the same random base. Prints one JSON line last: tokens a second, and how many times faster ours is.
"""

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import Peak
from peft import PeftModel
from per_expert import per_expert_model
from train_step import parse, train_steps, with_adapter, write_base

import lola_ft
from lola_ft.training.precision import choose_precision


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    precision = choose_precision("bfloat16", device)
    quantization = None if args.quantization == "none" else args.quantization
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), args)
        base = lola_ft.load_base(folder, quantization, precision.dtype, device, quiet=True)
        dense = lola_ft.load_base(folder, None, precision.dtype, device, quiet=True)
    ours = with_adapter(base, args.rank, args.checkpointing)
    common = per_expert_model(dense, args.rank, quantization is not None)
    del base, dense
    gc.collect()
    times: dict[str, list[float]] = {"ours": [], "common": []}
    memory = {}
    for _ in range(args.steps):
        with Peak() as peak:
            times["ours"] += train_steps(ours, args.batch, args.seq, 1, 1, precision)[0]
        memory["ours"] = peak.result()["anonymous"]
        with Peak() as peak:
            times["common"].append(common_step(common, args.batch, args.seq))
        memory["common"] = peak.result()["anonymous"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "tokens_per_s": {name: round(args.batch * args.seq / value, 1) for name, value in medians.items()},
                "times_faster": round(medians["common"] / medians["ours"], 2),
                "peak_anonymous_mb_both_loaded": memory,
                "dtype": str(precision.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            }
        )
    )


def common_step(model: PeftModel, batch: int, seq: int) -> float:
    """Seconds of one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(6, model.config.vocab_size, (batch, seq), device=model.device)
    began = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    loss.item()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
