"""The record of a finished run: `manifest.json`, and the model card, which is written only from the manifest."""

import json
import subprocess
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lola_ft.adapters.on_disk import read_adapter
from lola_ft.card import CardFacts, render_card
from lola_ft.card.stages import stage_of
from lola_ft.environment import hardware, library_versions
from lola_ft.families import recorded_family
from lola_ft.file_names import ADAPTER_FOLDER, CARD_FILE, MANIFEST_FILE
from lola_ft.files import write_text
from lola_ft.repo_id import is_repo_id
from lola_ft.training import processes
from lola_ft.training.reports.metrics import FLIP_RATE
from lola_ft.training.setup import Prepared

_LAST_LOADS = {
    "router_min_entropy": "lowest load entropy of a layer",
    "router_max_share": "largest share of an expert",
    "router_dead": "experts without tokens",
}


def manifest_of(
    prepared: Prepared, base: PreTrainedModel, results: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Make the manifest of a finished run from its results.

    The same recipe on the same machine gives the same manifest, except for the sections in `measured`.
    """
    recipe = prepared.recipe
    return {
        "recipe": recipe.model_dump(mode="json"),
        "code": git_state(),
        "versions": library_versions(),
        "hardware": hardware() | {"processes": processes.count()},
        "seeds": {"train": recipe.train.seed, "data": recipe.train.seed},
        "base": {
            "id": base.base_id,
            "revision": recipe.base.revision if is_repo_id(recipe.base.model) else None,
            "fingerprint": base.base_fingerprint,
            "dtype": str(prepared.precision.dtype).removeprefix("torch."),
            "parts": prepared.audit,
            "family": base.config.model_type,
        },
        "trained": {
            group: {"tensors": tensors, "parameters": parameters}
            for group, (tensors, parameters) in prepared.trained.items()
        },
        "data": prepared.data.as_dict(),
        "stages": _stages(prepared, results),
        **({"reference": prepared.reference.as_dict(recipe.train.reference_pass)} if prepared.reference else {}),
        "results": results,
        **measured,
    }


def _stages(prepared: Prepared, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of this run's adapter, with this run last."""
    start = prepared.start
    own = stage_of(prepared.recipe.model_dump(mode="json"), results, start.as_dict() if start else None)
    return [*(start.stages if start else ()), own]


def timings_of(prepare_s: float, train_s: float, tokens: int, resumed_from: int | None) -> dict[str, Any]:
    """Return the run's times; after a resume, `train_s` includes the time before it, and `prepare_s` does not."""
    timings: dict[str, Any] = {
        "prepare_s": round(prepare_s, 1),
        "train_s": round(train_s, 1),
        "tokens_per_s": round(tokens / max(train_s, 1e-9), 1),
        "measured": "wall clock; train_s includes evaluations and checkpoints, tokens exclude padding",
    }
    return timings if resumed_from is None else timings | {"resumed_from_step": resumed_from}


def routing_results(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the router's last measures, and the share of changed choices; {} if nothing was measured."""
    loads = [line for line in metrics if "router_min_entropy" in line]
    found: dict[str, Any] = {said: loads[-1][key] for key, said in _LAST_LOADS.items()} if loads else {}
    if loads:
        found["tokens these were measured on"] = loads[-1]["router_tokens"]
    flips = [line[FLIP_RATE] for line in metrics if FLIP_RATE in line]
    if flips:
        found["choices of experts on a probe text that differ from the base's"] = flips[-1]
    return found


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` whole or not at all."""
    write_text(output / MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_card(output: Path, manifest: dict[str, Any]) -> None:
    """Write the run's README, only from its manifest."""
    base, stored = manifest["recipe"]["base"], read_adapter(output / ADAPTER_FOLDER)
    facts = CardFacts(
        title=output.name,
        kind="adapter",
        location=ADAPTER_FOLDER,
        published=False,
        base=base["model"],
        family=recorded_family(manifest["base"].get("family")),
        base_revision=base["revision"] if is_repo_id(base["model"]) else None,
        layout=manifest["layout"],
        stock_peft=stored.loads_with_stock_peft,
        rows=stored.rows,
        manifest=manifest,
        files=tuple(sorted(file.name for file in (output / ADAPTER_FOLDER).iterdir())),
    )
    write_text(output / CARD_FILE, render_card(facts))


def git_state() -> dict[str, Any] | None:
    """Return the working directory's commit, and if tracked files differ from it; None without git or a checkout."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
