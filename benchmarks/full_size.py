"""LOLA's exact shapes with random weights, on this machine: write, load in NF4, one training step, a few tokens.

    python benchmarks/full_size.py [--source-dtype bfloat16|float32] [--folder DIR] [--load-only]

Needs 15 GB of disk for bfloat16 shards, 30 GB for float32. Prints one JSON line last and removes what it wrote. Memory
is the process's own (anonymous) and its resident peak, sampled ten times a second; the checkpoint is written by a child
process, so that writing does not count.
"""

import argparse
import gc
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import lola_ft
from lola_ft.adapters import AdapterSettings, attach, lora_config
from lola_ft.model import LolaConfig
from lola_ft.model.hub_checkpoint import expected_shapes
from lola_ft.model.safetensors_file import DTYPE_NAMES, TensorEntry
from lola_ft.model.safetensors_writer import SafetensorsWriter
from lola_ft.quantization import audit
from lola_ft.training.precision import choose_precision

SHARD_BYTES = 5_000_000_000


def main() -> None:
    args = parse()
    folder = Path(tempfile.mkdtemp(prefix="lola-full-size-", dir=args.folder))
    try:
        print(json.dumps(measure(folder, args)))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every stage and report it."""
    source_dtype = getattr(torch, args.source_dtype)
    precision = choose_precision("bfloat16", torch.device("cpu"))
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    child = multiprocessing.get_context("spawn").Process(
        target=write_checkpoint, args=(folder, source_dtype, args.layers)
    )
    child.start()
    child.join()
    assert child.exitcode == 0, "the checkpoint was not written"
    seconds["write"] = time.perf_counter() - began
    memory = {"after_imports": read_memory()}
    with Peak() as peak:
        began = time.perf_counter()
        model = lola_ft.load_base(folder, "nf4", args.dtype, device="cpu")
        seconds["load"] = time.perf_counter() - began
    memory["load"] = peak.result()
    parts = audit(model).as_dict()
    memory["loaded"] = read_memory()
    if not args.load_only:
        compute(model, args, precision.bf16, memory, seconds)
    return {
        "source_dtype": args.source_dtype,
        "compute_dtype": args.dtype,
        "parts": parts,
        "quantised_bytes": sum(part["bytes"] for part in parts.values()),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "memory_mb": memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def compute(
    model: torch.nn.Module, args: argparse.Namespace, bf16: bool, memory: dict[str, Any], seconds: dict[str, float]
) -> None:
    """A forward, a training step and a few tokens; notes memory and seconds."""
    ids = torch.randint(6, 100_000, (1, args.seq))
    with Peak() as peak:
        began = time.perf_counter()
        with torch.no_grad():
            model(ids[:, :64])
        seconds["forward_64_tokens"] = time.perf_counter() - began
        seconds["train_step"] = train_step(model, ids, bf16)
    memory["train"] = peak.result()
    began = time.perf_counter()
    with torch.no_grad():
        model.eval()
        model.generate(ids[:, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
    seconds["generate_8_tokens"] = time.perf_counter() - began


def train_step(model: torch.nn.Module, ids: torch.Tensor, bf16: bool) -> float:
    """One step of LoRA on attention and all experts with gradient checkpointing; seconds."""
    began = time.perf_counter()
    peft_model = attach(model, lora_config(AdapterSettings(attention_rank=16, expert_rank=16))).train()  # type: ignore[arg-type]
    peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = peft_model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    return time.perf_counter() - began


def write_checkpoint(folder: Path, dtype: torch.dtype, layers: int) -> None:
    """Write random weights in the Hub's layout, shard by shard."""
    config = LolaConfig(n_layer=layers)
    config.save_pretrained(folder)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in expected_shapes(config).items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    weight_map = {}
    pool = torch.randn(1 << 24).mul_(0.02)  # every tensor is a stretch of these, from a place of its own
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        entries = [TensorEntry(name, folder / file, DTYPE_NAMES[dtype], shape, 0, 0) for name, shape in shard]
        with SafetensorsWriter(folder / file, entries, dtype) as writer:
            for j, (name, shape) in enumerate(shard):
                numel = torch.Size(shape).numel()
                values = pool.roll(7919 * (j + 1000 * i)).repeat(-(-numel // pool.numel()))[:numel]
                writer.write(values.view(shape))
                weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Peak:
    """Samples this process's memory while its block runs."""

    def __enter__(self) -> "Peak":
        self._stop = threading.Event()
        self._most = read_memory()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> dict[str, float]:
        """Largest anonymous and resident memory seen, MB."""
        return self._most

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            now = read_memory()
            self._most = {key: max(value, self._most[key]) for key, value in now.items()}


def read_memory() -> dict[str, float]:
    """Anonymous and resident memory of this process, MB (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: round(int(fields[key].split()[0]) * 1024 / 1e6, 1)
        for name, key in (("anonymous", "RssAnon"), ("resident", "VmRSS"))
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what stays dense")
    parser.add_argument("--folder", help="where to write the checkpoint; the system's temporary folder if left out")
    parser.add_argument("--load-only", action="store_true", help="stop after loading")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--seq", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
