"""Another family at its exact shapes with random weights: `python benchmarks/full_size.py --family olmoe`.

The stages, each in its own process: write the checkpoint shard by shard; load it in 4 bit, train one step of LoRA on
attention and experts, generate a few tokens; write an adapter, merge it, and copy the same bytes before and after.
Memory is the process's own (anonymous), above the memory after its imports.

OLMoE-1B-7B needs 42 GB of disk. Qwen3-30B-A3B has 61 GB of weights: `--layers 8` needs 33 GB, and figures that grow
with the layers are extrapolated to all 48.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from memory import Peak, read_memory
from random_checkpoint import write_checkpoint, write_random_adapter

from merge import alone, timed_copy, timed_merge

SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {  # allenai/OLMoE-1B-7B-0924
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
    },
    "qwen3_moe": {  # Qwen/Qwen3-30B-A3B
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "vocab_size": 512,
}
WHOLE = {"olmoe": 16, "qwen3_moe": 48}
WANTED = {"load_above_quantised_gb": 0.4, "merge_over_copy": 1.5, "merge_gb": 0.3}


def measure_family(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every stage and return the results."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    layers, busy = min(args.layers, WHOLE[args.family]), [os.getloadavg()[0]]
    sizes = SHAPES[args.family] | (SMALL if args.small else {})
    began = time.perf_counter()
    alone(write_checkpoint, base, torch.bfloat16, layers, args.family, **sizes)
    written = time.perf_counter() - began
    used = alone(load_and_train, base, args.rank, args.seq)
    busy.append(os.getloadavg()[0])
    alone(write_random_adapter, adapter, base, args.rank)
    copies = [alone(timed_copy, base, folder / "copy")]
    merged = alone(timed_merge, base, adapter, folder / "merged", "none")
    copies.append(alone(timed_copy, base, folder / "copy"))
    busy.append(os.getloadavg()[0])
    imports, peak = merged["memory"]["after_imports"], merged["memory"]["peak"]
    result = used | {
        "family": args.family,
        "layers": layers,
        "base_gb": gigabytes(sum(file.stat().st_size for file in base.glob("*.safetensors"))),
        "write_s": round(written, 1),
        "merge_s": round(merged["seconds"], 1),
        "copy_s": [round(seconds, 1) for seconds in copies],
        "merge_over_copy": round(2 * merged["seconds"] / sum(copies), 2),
        "merge_gb": round((peak["anonymous"] - imports["anonymous"]) / 1e3, 3),
        "adapter_tensors": merged["applied"],
        "wanted": WANTED,
        "load_average": busy,
        "threads": torch.get_num_threads(),
    }
    return result | {"whole": extrapolated(result, WHOLE[args.family])}


def load_and_train(base: Path, rank: int, seq: int) -> dict[str, Any]:
    """Load in 4 bit, generate and train a step; return seconds and gigabytes."""
    import lola_ft
    from lola_ft.checkpoints.base_checkpoint import open_config
    from lola_ft.kernels.precision import has_bfloat16
    from lola_ft.quantization import audit

    load_base = lola_ft.load_base
    open_config(base)[1].family.model_class()  # imports modules, which is not part of loading
    imports = read_memory()["anonymous"]
    with Peak() as peak:
        began = time.perf_counter()
        model = load_base(base, "nf4", "bfloat16", device="cpu", quiet=True)
        load_s = time.perf_counter() - began
    loaded = peak.result()["anonymous"] - imports
    parts = audit(model).as_dict()
    quantised = sum(part["bytes"] for part in parts.values())
    in_layers = sum(part["bytes"] for name, part in parts.items() if not name.startswith(("embeddings", "head")))
    ids = torch.randint(6, model.config.vocab_size, (1, seq))
    if not has_bfloat16(torch.device("cpu")):
        model.float()  # the dense weights: bfloat16 products are hundreds of times slower on such a CPU
    grown = sum(part["bytes"] for part in audit(model).as_dict().values()) - quantised
    with torch.no_grad():
        began = time.perf_counter()
        out = model.generate(ids[:, :16], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1)
        generate_s = time.perf_counter() - began
    assert out.shape[1] == min(seq, 16) + 4, "it did not generate four tokens"
    step_s, loss, trained = training_step(model, rank, seq)
    return {
        "parameters": sum(part["parameters"] for part in parts.values()),
        "quantised_gb": gigabytes(quantised),
        "of_which_in_layers_gb": gigabytes(in_layers),
        "load_s": round(load_s, 1),
        "load_peak_gb": round(loaded / 1e3, 3),
        "load_above_quantised_gb": round(loaded / 1e3 - quantised / 1e9, 3),
        "generate_4_tokens_s": round(generate_s, 2),
        "train_step_s": round(step_s, 2),
        "train_peak_gb": round((trained - imports) / 1e3, 3),
        "of_which_dense_in_float32_gb": gigabytes(grown),
        "loss": round(loss, 4),
    }


def training_step(model: Any, rank: int, seq: int) -> tuple[float, float, float]:
    """Return seconds, loss and peak memory (MB) of a step of LoRA on attention and experts with checkpointing."""
    from train_step import train_steps, with_adapter  # imported late: loading does not need the trainer

    from lola_ft.training.precision import choose_precision

    peft_model = with_adapter(model, rank, checkpointing=True)
    with Peak() as peak:
        seconds, loss = train_steps(peft_model, 1, seq, 0, 1, choose_precision("bfloat16", torch.device("cpu")))
    return seconds[0], loss, peak.result()["anonymous"]


def extrapolated(found: dict[str, Any], whole: int) -> dict[str, Any]:
    """Return the figures of a model with all layers: layers' parts times their number, embeddings and head once.

    Seconds are assumed to grow with the layers as a whole, which is slightly too much.
    """
    times = whole / found["layers"]
    fixed = found["quantised_gb"] - found["of_which_in_layers_gb"]
    grown = found["of_which_dense_in_float32_gb"]
    trained = found["train_peak_gb"] - found["quantised_gb"] - grown
    figures = {
        "quantised_gb": round(fixed + found["of_which_in_layers_gb"] * times, 2),
        "above_quantised_in_training_gb": round(grown + trained * times, 2),
    }
    seconds = ("load_s", "train_step_s", "generate_4_tokens_s", "merge_s")
    return {"layers": whole} | figures | {name: round(found[name] * times, 1) for name in seconds}


def gigabytes(size: int) -> float:
    return round(size / 1e9, 6)
