"""Write `files/` with the imported version of lola_ft. `README.md` names the version that wrote the stored files.

    PYTHONPATH=EARLIER_CHECKOUT OMP_NUM_THREADS=1 python tests/earlier/make.py NEW_FOLDER

Everything is trained, converted, quantised and merged by the command line, with paths relative to the folder. The
models' logits are stored, too.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import lola_ft
from lola_ft.cli import main
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.nano.build import train_tokenizer
from lola_ft.open_model import open_model

TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "one two three four five six seven eight nine ten",
]
NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TOKENS = {"vocab_size": 272, "bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 1, "initializer_range": 0.25}
IDS = torch.arange(6, 6 + 48).reshape(2, 24) * 5
KEPT = (slice(None), slice(1, None, 2), slice(None, None, 4))
"""The logits that are stored: every fourth logit of every other token."""
ROWS = ("--data", "rows.jsonl", "--format", "alpaca", "--language-column", "language")
WEIGHTS_TIME_NS = 1_750_000_000_000_000_000
"""Modification time of the base's weights, which a cache compares. git stores no such times."""

ALL = {"attention": {"rank": 4}, "mlp": {"rank": 2, "alpha": 4.0}, "experts": {"rank": 2}}
LINEAR = {key: ALL[key] for key in ("attention", "mlp")}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": ALL},
    "rslora": {"adapter": LINEAR | {"variant": "rslora"}},
    "norms_biases": {"adapter": {"attention": {"rank": 2}, "norms": True, "biases": True}},
    "router_tuned": {"adapter": {"experts": {"rank": 2}}, "router": {"mode": "tuned"}},
    "router_lora": {"adapter": {"attention": {"rank": 2}}, "router": {"mode": "lora", "rank": 2}},
    "dora": {"adapter": LINEAR | {"variant": "dora"}},
    "selection": {"adapter": {"experts": {"rank": 2, "select": [[0, 2], [3]]}}},
    "selection_biases": {"adapter": {"experts": {"rank": 2, "select": [[1], [0, 3]]}, "biases": True}},
    "loftq": {"base": {"quantization": "nf4"}, "adapter": ALL | {"init": "loftq"}},
}
"""LOLA's adapters by name: the differences from the recipe in `write_recipe`."""

RUNS: dict[str, dict[str, Any]] = {
    "lola": {
        "base": {"quantization": "nf4"},
        # Experts of this rank have stacks of 4,096 numbers, whose optimiser state is kept in 8 bits.
        "adapter": {"attention": {"rank": 2}, "experts": {"rank": 16}, "dropout": 0.1, "norms": True},
        "router": {"mode": "tuned", "aux_loss": 0.01},
        "train": {"max_steps": 7, "save_every": 4, "optimizer": "adamw_8bit"},
    },
    "gpt2": {"base": {"quantization": "nf4"}, "adapter": LINEAR, "train": {"max_steps": 7, "save_every": 4}},
    "bloom": {"base": {"quantization": "nf4"}, "adapter": LINEAR},
}
STOPPED = {"lola": 4, "gpt2": 4}
"""Runs that are also stored in their state after this step."""


def randomise_biases(model: Any) -> None:
    """Set biases to random numbers, because a new model's are zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, std=0.1)


def write_bases() -> None:
    """Write random tiny bases with their tokenizer."""
    torch.manual_seed(22)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 16, "n_head": 2, "n_positions": 64}
    lola = LolaConfig(**sizes, **quiet, **TOKENS, n_layer=4, n_inner=64, num_experts=4)
    gpt2 = GPT2Config(**sizes, **quiet, **TOKENS, n_layer=2, n_inner=64)
    bloom = BloomConfig(hidden_size=16, n_layer=2, n_head=2, **TOKENS)
    models = {"lola": LolaForCausalLM(lola), "gpt2": GPT2LMHeadModel(gpt2), "bloom": BloomForCausalLM(bloom)}
    for name, model in models.items():
        randomise_biases(model)
        folder = Path("bases", name)
        model.save_pretrained(folder)
        train_tokenizer(TEXT, vocab_size=TOKENS["vocab_size"], max_length=64).save_pretrained(folder)
        os.utime(folder / "model.safetensors", ns=(WEIGHTS_TIME_NS, WEIGHTS_TIME_NS))


def write_rows() -> None:
    rows = [
        {"instruction": f"Name {i % 10}", "input": "", "output": NAMES[i % 10], "language": ("en", "sw")[i % 2]}
        for i in range(40)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(name: str, model: str, output: str, **changes: dict[str, Any]) -> str:
    """Write `recipes/NAME.yaml`; `changes` replace single keys of its sections."""
    recipe: dict[str, Any] = {
        "base": {"model": f"./bases/{model}", "quantization": "none", "dtype": "float32"},
        "adapter": {"alpha": 8.0, "dropout": 0.0},
        "data": {
            "sources": [{"path": "rows.jsonl", "format": "alpaca", "language_column": "language"}],
            "template": "plain",
            "validation": 0.2,
            "max_length": 48,
        },
        "train": {
            "max_steps": 4,
            "micro_batch_size": 4,
            "grad_accum_steps": 1,
            "learning_rate": 0.015,
            "optimizer": "adamw",
            "scheduler": "constant",
            "save_every": 0,
            "gradient_checkpointing": False,
        },
        "output": output,
    }
    for section, keys in changes.items():
        recipe[section] = recipe.get(section, {}) | keys
    path = Path("recipes", f"{name}.yaml")
    path.parent.mkdir(exist_ok=True)
    YAML().dump(recipe, path)
    return str(path)


def verb(*arguments: str) -> None:
    """Run `lola-ft …`, which has to end with code 0."""
    code: Any = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    assert not code, f"lola-ft {' '.join(arguments)}: exit code {code}"


def write_adapters() -> None:
    """Train each of LOLA's adapters and store it in both layouts, without the tokenizer that training adds."""
    for name, changes in ADAPTERS.items():
        verb("train", write_recipe(name, "lola", f"./trained/{name}", **changes))
        trained, folder = Path("trained", name, "adapter"), Path("adapters", name)
        layout = json.loads(trained.with_name("manifest.json").read_text())["layout"]
        shutil.copytree(trained, folder / layout, ignore=shutil.ignore_patterns("token*", "*.jinja"))
        other = {"peft": "per_expert", "per_expert": "peft"}[layout]
        verb("convert", str(folder / layout), "--base", "./bases/lola", "--layout", other, "--out", f"{folder / other}")
    shutil.rmtree("trained")
    for name in ADAPTERS:
        Path("recipes", f"{name}.yaml").unlink()


def write_runs() -> None:
    """Train and evaluate the runs. Some are also stored in their state one step after a checkpoint."""
    for name, changes in RUNS.items():
        verb("train", write_recipe(name, name, f"./finished/{name}", **changes))
        finished, stopped = Path("finished", name), Path("stopped", name)
        if step := STOPPED.get(name):
            kept = ("recipe.yaml", "metrics.jsonl", f"checkpoints/step-{step}")
            for part in kept:
                source, target = finished / part, stopped / part
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
            lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
            (stopped / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= step + 1))
        shutil.rmtree(finished / "checkpoints")
        for picture in finished.glob("*.png"):
            picture.unlink()
        verb("evaluate", f"./bases/{name}", f"finished/{name}", *ROWS, "--out", f"evaluations/{name}")
        for file in Path("evaluations", name).iterdir():
            if file.name != "loss.json":
                file.unlink()


def write_cache() -> None:
    """Quantise LOLA's base once."""
    os.environ["LOLA_FT_CACHE"] = str(Path("cache").resolve())
    verb("quantize", "./bases/lola", "--dtype", "float32")
    shutil.rmtree(Path("cache", "rows"), ignore_errors=True)


def write_merged() -> None:
    verb("merge", "adapters/lora/peft", "--base", "./bases/lola", "--out", "merged/lola")


@torch.no_grad()
def write_logits() -> None:
    """Store the float32 logits of every base with its adapter."""
    found: dict[str, torch.Tensor] = {"input_ids": IDS}
    for name in ADAPTERS:
        for layout in ("peft", "per_expert"):
            base = lola_ft.load_base("./bases/lola", quantization(name), "float32", "cpu", quiet=True)
            key = f"adapters/{name}"
            logits = logits_of(lola_ft.load_adapter(base, Path(key, layout)))
            assert torch.equal(found.setdefault(key, logits), logits), f"{key}: the layouts differ"
    plain = logits_of(lola_ft.load_base("./bases/lola", None, "float32", "cpu", quiet=True))
    for key, logits in found.items():
        assert key == "input_ids" or (logits - plain).abs().max() > 0.3, f"{key} hardly changes the base"
    for name in RUNS:
        for stored_as in ("nf4", "none"):
            run = open_model(f"finished/{name}", quantization=stored_as, dtype="float32", device="cpu")
            found[f"finished/{name}/{stored_as}"] = logits_of(run.model)
    kept = {key: tensor if key == "input_ids" else tensor[KEPT] for key, tensor in found.items()}
    save_file({key: tensor.contiguous() for key, tensor in kept.items()}, "logits.safetensors")


def quantization(adapter: str) -> str | None:
    """Return the quantization of the base that an adapter was trained on."""
    return ADAPTERS[adapter].get("base", {}).get("quantization")


def logits_of(model: Any) -> torch.Tensor:
    """Compute logits. For LOLA, check that every expert gets tokens, and that rounding cannot change a choice."""
    if model.config.model_type != "lola_v1":
        return model.eval()(IDS).logits
    output = model.eval()(IDS, output_router_logits=True)
    for router_logits in output.router_logits:
        first, second = router_logits.topk(2).values.unbind(-1)
        reached = len(set(router_logits.argmax(-1).flatten().tolist()))
        assert reached >= 3, f"tokens reach {reached} of 4 experts only"
        assert (first - second).min() > 1e-4, "a token is between two experts"
    return output.logits


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Compute in float32 on every machine, like the tests.
    torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
    Path(sys.argv[1]).mkdir(parents=True)
    os.chdir(sys.argv[1])
    write_bases()
    write_rows()
    write_adapters()
    write_runs()
    write_cache()
    write_merged()
    write_logits()
