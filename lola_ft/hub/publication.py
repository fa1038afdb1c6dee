"""A folder to publish, recognised as a run, an adapter or a merged model, and its base on the Hub and on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from lola_ft.adapters.layouts import CONFIG_FILE
from lola_ft.adapters.on_disk import WEIGHTS_FILE, read_adapter
from lola_ft.errors import AdapterError, PublishError, UserError, in_words
from lola_ft.file_names import MERGE_REPORT_FILE, RECIPE_FILE
from lola_ft.repo_id import is_commit, is_repo_id
from lola_ft.subject import find_subject


@dataclass(frozen=True)
class Source:
    """A folder to publish.

    Attributes:
        folder: The folder with the weights.
        run: The run that they come from; None if unknown.
        base: The base's name in the run or the adapter; "" if neither names it.
        revision: The base's revision.
        layout: The adapter's layout; None for merged weights.
        manifest: The run's `manifest.json`; {} without a run.
    """

    kind: Literal["adapter", "merged"]
    folder: Path
    run: Path | None
    base: str
    revision: str | None
    layout: str | None
    manifest: dict[str, Any]


def find_source(path: str | Path) -> Source:
    """Recognise the folder to publish: a finished run, an adapter or a merged model; else raise PublishError."""
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
        PublishError: The file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise PublishError(f"{file}: holds {in_words(content)}, not an object.")
    return content


@dataclass(frozen=True)
class Base:
    """A base that other people can download.

    Attributes:
        id: Its id on the Hub.
        revision: Branch, tag or commit, as exactly as known.
        folder: Its folder on this machine; None if it is not here.
    """

    id: str
    revision: str | None
    folder: Path | None


def find_base(source: Source, base: str | None = None, base_id: str | None = None) -> Base:
    """Find the base's Hub id and local folder; raises PublishError if its Hub id is unknown or malformed.

    Args:
        base: Folder or Hub id for the check, from the user.
        base_id: Hub id for the card, from the user.
    """
    if base_id is not None and not is_repo_id(base_id):
        raise PublishError(f"--base-id {base_id}: not the id of a repository. Write it as owner/name.")
    if base and not Path(base).is_dir() and not is_repo_id(base):
        raise PublishError(f"--base {base}: no such folder. Give the base's folder, or its Hub id as owner/name.")
    on_hub = [name for name in (source.base, base) if name and is_repo_id(name) and not Path(name).is_dir()]
    public = base_id or (on_hub[0] if on_hub else None)
    if public is None:
        known = f"its base is a local folder ({source.base})" if source.base else "its base is unknown"
        raise PublishError(
            f"{source.folder}: {known}, so other people could not load what you publish. Give the base's id on the Hub "
            "with --base-id owner/name."
        )
    revision = source.revision if public == source.base else None
    local = base or source.base
    if local and Path(local).is_dir():
        return Base(public, revision, Path(local))
    folder = _cached(local or public, source.revision if local == source.base else None)
    if folder and public == (local or public) and is_commit(folder.name):
        revision = folder.name
    return Base(public, revision, folder)


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot in the Hub's local cache; None if it is not there. Nothing is downloaded for a check."""
    files = ["*.safetensors", "*.json"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
