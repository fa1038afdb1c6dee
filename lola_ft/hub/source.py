"""What a folder to publish is: a run, an adapter or a merged model, and what it tells of its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lola_ft.adapters.files import WEIGHTS_FILE, read_adapter
from lola_ft.adapters.layouts import CONFIG_FILE
from lola_ft.errors import PublishError
from lola_ft.file_names import MANIFEST_FILE, RECIPE_FILE


@dataclass(frozen=True)
class Source:
    """A folder to publish.

    Attributes:
        folder: Where the weights are.
        run: The run they come from, if it is known.
        base: The base as run or adapter names it; "" if neither does.
        revision: Of the base.
        layout: The adapter's; None for merged weights.
        manifest: The run's `manifest.json`, {} without a run.
    """

    kind: Literal["adapter", "merged"]
    folder: Path
    run: Path | None
    base: str
    revision: str | None
    layout: str | None
    manifest: dict[str, Any]


def find_source(path: str | Path) -> Source:
    """Tell what is to be published.

    Raises:
        PublishError: If it is none of the three, or a run that did not end.
        AdapterError: If the adapter is damaged.
    """
    given = Path(path)
    if not given.is_dir():
        raise PublishError(f"{given}: no such folder. Give a run, an adapter's folder or a merged model's.")
    if (given / RECIPE_FILE).is_file():
        if not (given / "adapter" / CONFIG_FILE).is_file() or not (given / MANIFEST_FILE).is_file():
            raise PublishError(f"{given}: this run has no adapter yet. Did the run end?")
        return _adapter(given / "adapter", given)
    if (given / CONFIG_FILE).is_file():
        return _adapter(given, _run_of(given))
    if (given / "config.json").is_file():
        return _merged(given, _run_of(given))
    raise PublishError(
        f"{given}: nothing to publish here. A run holds {RECIPE_FILE}, an adapter {CONFIG_FILE} and {WEIGHTS_FILE}, a "
        "merged model config.json and model.safetensors."
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        PublishError: If the file holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise PublishError(f"{file}: holds {type(content).__name__}, not an object.")
    return content


def _adapter(folder: Path, run: Path | None) -> Source:
    stored = read_adapter(folder)
    manifest, base, revision = _told_by(run)
    return Source(
        kind="adapter",
        folder=folder,
        run=run,
        base=base or stored.config.get("base_model_name_or_path") or "",
        revision=revision or stored.config.get("revision"),
        layout=stored.layout,
        manifest=manifest,
    )


def _merged(folder: Path, run: Path | None) -> Source:
    manifest, base, revision = _told_by(run)
    return Source("merged", folder, run, base, revision, None, manifest)


def _run_of(folder: Path) -> Path | None:
    """The run that a folder `adapter` or `merged` lies in."""
    parent = folder.absolute().parent
    inside = folder.absolute().name in ("adapter", "merged")
    return parent if inside and (parent / RECIPE_FILE).is_file() and (parent / MANIFEST_FILE).is_file() else None


def _told_by(run: Path | None) -> tuple[dict[str, Any], str, str | None]:
    """The manifest, the base and its revision."""
    if run is None:
        return {}, "", None
    manifest = read_json(run / MANIFEST_FILE)
    base = manifest.get("recipe", {}).get("base", {})
    return manifest, base.get("model") or "", base.get("revision")
