"""A folder to publish, recognised as a run, an adapter or a merged model, with the base that it names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lola_ft.adapters.layouts import CONFIG_FILE
from lola_ft.adapters.on_disk import WEIGHTS_FILE, read_adapter
from lola_ft.errors import AdapterError, PublishError, UserError
from lola_ft.file_names import MERGE_REPORT_FILE, RECIPE_FILE
from lola_ft.subject import find_subject


@dataclass(frozen=True)
class Source:
    """A folder to publish.

    Attributes:
        folder: Where the weights are.
        run: The run they come from, if it is known.
        base: The base as run or adapter names it; "" if neither does.
        revision: The base's.
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
    """Recognise the folder to publish.

    Raises:
        PublishError: If it is neither a run, an adapter nor a merged model; or a run that did not end.
        AdapterError: If the adapter is damaged.
    """
    given = Path(path)
    if not given.is_dir():
        raise PublishError(f"{given}: no such folder. Give a run, an adapter's folder or a merged model's.")
    try:
        subject = find_subject(given, needs_base=False)
    except AdapterError:
        raise
    except UserError as error:
        raise PublishError(str(error)) from error
    if subject.kind == "base":
        raise PublishError(
            f"{given}: nothing to publish here. A run holds {RECIPE_FILE}, an adapter {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}, a merged model {MERGE_REPORT_FILE}."
        )
    own = subject.manifest.get("recipe", {}).get("base", {})
    if subject.kind == "merged":
        base, revision, layout = own.get("model"), own.get("revision"), None
    else:
        base, revision, layout = subject.base, subject.revision, read_adapter(subject.folder).layout
        base, revision = own.get("model") or base, own.get("revision") or revision
    kind: Literal["adapter", "merged"] = "merged" if subject.kind == "merged" else "adapter"
    return Source(kind, subject.folder, subject.run, base or "", revision, layout, subject.manifest)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

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
