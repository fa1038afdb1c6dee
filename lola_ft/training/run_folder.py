"""The run folder: who may write there, the manifest, the model card's draft."""

import json
from pathlib import Path
from typing import Any

from lola_ft.adapters.files import read_adapter
from lola_ft.baseline.card import write_dense_card
from lola_ft.baseline.families import FAMILIES, FAMILY_KEY
from lola_ft.card import CardFacts, render_card
from lola_ft.errors import UserError
from lola_ft.file_names import (  # noqa: F401 (the folder's names, for the rest of training)
    ADAPTER_FOLDER,
    CARD_FILE,
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    METRICS_FILE,
    RECIPE_FILE,
)
from lola_ft.files import write_text
from lola_ft.repo_id import is_repo_id
from lola_ft.training.lock import LOCK_FILE, is_locked

_NOTHING_YET = (
    LOCK_FILE,
    f".{RECIPE_FILE}.partial",
)  # what is left of a run that was killed before its recipe was there


def refuse_taken(output: Path) -> None:
    """Refuse an output folder that holds anything, before any work is done.

    Raises:
        UserError: Saying how to go on.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: output is a file; name a folder.")
    if not output.is_dir() or all(path.name in _NOTHING_YET for path in output.iterdir()):
        return
    if not (output / RECIPE_FILE).exists():
        raise UserError(f"{output}: is not empty. Choose another `output`, or remove that folder first.")
    if is_locked(output):
        raise UserError(f"{output}: already holds a run, which is going on. Choose another `output`.")
    go_on = "" if is_finished(output) else "Go on with it with --resume, "
    choose = "choose" if go_on else "Choose"
    raise UserError(f"{output}: already holds a run. {go_on}{choose} another `output`, or remove that folder first.")


def is_finished(output: Path) -> bool:
    """Whether a run has written all that it writes; the card is the last."""
    return (output / MANIFEST_FILE).exists() and (output / CARD_FILE).exists()


def write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` whole or not at all."""
    write_text(output / MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_card(output: Path, manifest: dict[str, Any]) -> None:
    """Write the run's README from its manifest alone."""
    base = manifest["recipe"]["base"]
    if family := FAMILIES.get(manifest["base"].get(FAMILY_KEY)):
        write_dense_card(output, manifest, family, base["model"])
        return
    facts = CardFacts(
        title=output.name,
        kind="adapter",
        location=ADAPTER_FOLDER,
        published=False,
        base=base["model"],
        base_revision=base["revision"] if is_repo_id(base["model"]) else None,
        layout=manifest["layout"],
        stock_peft=read_adapter(output / ADAPTER_FOLDER).loads_with_stock_peft,
        manifest=manifest,
        files=tuple(sorted(file.name for file in (output / ADAPTER_FOLDER).iterdir())),
    )
    write_text(output / CARD_FILE, render_card(facts))
