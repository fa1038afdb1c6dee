"""The base of what is published: its name on the Hub, and where it lies on this machine."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from lola_ft.errors import PublishError
from lola_ft.hub.publication import Source
from lola_ft.repo_id import is_commit, is_repo_id

_FILES = ("*.safetensors", "*.json")


@dataclass(frozen=True)
class Base:
    """A base that others can have.

    Attributes:
        id: On the Hub.
        revision: Branch, tag or commit, as exactly as it is known.
        folder: On this machine; None if it is not here.
    """

    id: str
    revision: str | None
    folder: Path | None


def find_base(source: Source, base: str | None = None, base_id: str | None = None) -> Base:
    """The base's Hub id and local folder.

    Args:
        base: Folder or Hub id that the user gave for the check.
        base_id: Hub id that the user gave for the card.

    Raises:
        PublishError: If no Hub id is known, or a given one is none.
    """
    if base_id is not None and not is_repo_id(base_id):
        raise PublishError(f"--base-id {base_id}: not the id of a repository. Write it as owner/name.")
    if base and not Path(base).is_dir() and not is_repo_id(base):
        raise PublishError(f"--base {base}: no such folder. Give the base's folder, or its Hub id as owner/name.")
    public = base_id or next((name for name in (source.base, base) if name and _on_hub(name)), None)
    if public is None:
        known = f"its base is a local folder ({source.base})" if source.base else "does not say which base it has"
        raise PublishError(
            f"{source.folder}: {known}; whoever downloads it could not load it. Give the base's id on the Hub with "
            "--base-id owner/name."
        )
    revision = source.revision if public == source.base else None
    local = base or source.base
    if local and Path(local).is_dir():
        return Base(public, revision, Path(local))
    folder = _cached(local or public, source.revision if local == source.base else None)
    if folder and public == (local or public) and is_commit(folder.name):
        revision = folder.name
    return Base(public, revision, folder)


def _on_hub(name: str) -> bool:
    return is_repo_id(name) and not Path(name).is_dir()


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the Hub's cache; nothing is downloaded for a check."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_FILES), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
