"""The run folder: who may write there, the manifest, the model card's draft."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lola_ft.errors import UserError
from lola_ft.files import write_text

RECIPE_FILE, MANIFEST_FILE, METRICS_FILE, LOSS_PLOT = "recipe.yaml", "manifest.json", "metrics.jsonl", "loss.png"
ADAPTER_FOLDER, CHECKPOINTS_FOLDER = "adapter", "checkpoints"
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


def refuse_taken(output: Path) -> None:
    """Refuse an output folder that holds anything, before any work is done.

    Raises:
        UserError: Saying how to go on.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: output is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()):
        holds = "already holds a run" if (output / RECIPE_FILE).exists() else "is not empty"
        raise UserError(f"{output}: {holds}. Choose another `output`, or remove that folder first.")


def library_versions() -> dict[str, str]:
    """Versions of Python, lola_ft and the libraries that decide a run's numbers."""
    versions = {"python": platform.python_version()}
    for package in ("lola-ft", *_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def hardware() -> dict[str, Any]:
    """What the run computed on."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` whole or not at all."""
    write_text(output / MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_card(output: Path, manifest: dict[str, Any]) -> None:
    """Write the run's README from its manifest alone."""
    recipe, results = manifest["recipe"], manifest["results"]
    base = recipe["base"]["model"]
    rows = "\n".join(
        f"| {language} | {counts['kept']:,} | {counts['trained_tokens']:,} |"
        for language, counts in manifest["data"]["train"]["languages"].items()
    )
    losses = ", ".join(f"{key} {results[key]:.4f}" for key in ("mean_loss", "eval_loss") if key in results)
    quantized = recipe["base"]["quantization"]
    text = f"""# {output.name}

A LoRA adapter for {base}, trained with lola_ft; its settings are in `{RECIPE_FILE}`.

| | |
|---|---|
| base | {base} (fingerprint `{manifest["base"]["fingerprint"]}`) |
| trained on | {"4-bit (NF4) base" if quantized == "nf4" else "unquantised base"}, {manifest["base"]["dtype"]} |
| trained parameters | {sum(group["parameters"] for group in manifest["trained"].values()):,} |
| optimiser steps | {results["steps"]} |
| loss | {losses} |

| language | rows | trained tokens |
|---|---:|---:|
{rows}

Load it:

    import lola_ft

    model = lola_ft.load_base({base!r})
    model = lola_ft.load_adapter(model, "{ADAPTER_FOLDER}")
"""
    write_text(output / "README.md", text)
