"""The stages of an adapter: runs that each continued training the adapter of the run before."""

from pathlib import Path
from typing import Any

from lola_ft.repo_id import is_repo_id

Stage = dict[str, Any]
"""The facts of one run: its name, its starting adapter (None: the base), objective, data and length."""


def stage_of(recipe: dict[str, Any], results: dict[str, Any], started_from: dict[str, Any] | None) -> Stage:
    """Return a run's stage, with folders of this machine shortened to their last name."""
    data, train = recipe.get("data", {}), recipe.get("train", {})
    stage = {
        "run": Path(recipe.get("output", "")).name,
        "started_from": started_from and started_from | {"adapter": _portable(started_from["adapter"])},
        "objective": recipe.get("objective", "sft"),
        "template": Path(data.get("template", "")).name,
        "data": [source.get("hub") or Path(source.get("path") or "").name for source in data.get("sources", [])],
        "learning_rate": train.get("learning_rate"),
        "steps": results.get("steps"),
    }
    return stage if train.get("reference") is None else stage | {"reference": train["reference"]}


def stages_in(manifest: dict[str, Any]) -> list[Stage]:
    """Return a run's stages from its manifest, the run itself last; [] if the manifest does not have them."""
    stages: list[Stage] = manifest.get("stages") or []
    if stages or "recipe" not in manifest:
        return stages
    return [stage_of(manifest["recipe"], manifest.get("results") or {}, None)]  # a manifest of an older version


def stage_rows(stages: list[Stage]) -> list[list[str]]:
    """Return the rows of the table of stages, oldest first."""
    return [
        [
            str(number),
            stage.get("run") or "unknown",
            _from(stage),
            stage.get("objective", ""),
            ", ".join(stage.get("data", [])),
            f"{stage['steps']:,}" if stage.get("steps") else "",
            f"{stage['learning_rate']:g}" if stage.get("learning_rate") else "",
        ]
        for number, stage in enumerate(stages, start=1)
    ]


STAGE_HEADER = ["stage", "run", "started from", "objective", "data", "steps", "learning rate"]


def _from(stage: Stage) -> str:
    start = stage.get("started_from")
    if not start:
        return "the base"
    commit = f"@{start['revision'][:12]}" if start.get("revision") else ""
    return f"{start['adapter']}{commit} (`{start['sha256'][:12]}`)"


def _portable(name: str) -> str:
    return name if is_repo_id(name) and not Path(name).exists() else Path(name).name or name
