"""The model that a user names, recognised as a base, a run, an adapter or a merged model, for every verb."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lola_ft.adapters.on_disk import CONFIG_FILE, read_adapter
from lola_ft.checkpoints.folder import commit_of, resolve_folder
from lola_ft.errors import AdapterError, NoCheckpointError, UserError
from lola_ft.file_names import ADAPTER_FOLDER, MANIFEST_FILE, MERGE_REPORT_FILE, MERGED_FOLDER, RECIPE_FILE


@dataclass(frozen=True)
class Subject:
    """A base, run, adapter or merged model, found but not loaded.

    Attributes:
        name: The name as the user wrote it, which tables show.
        folder: The folder of its own files: the adapter's folder for a run or an adapter, else the model's.
        base: Folder or Hub id of the weights to load first; for a base or a merged model, its own name. "" if neither
            run nor adapter names a base and none is needed.
        revision: The commit of a base on the Hub if known, else the revision that user, run or adapter name.
        quantization: The form of the base in the run's training ("nf4" or None), or the form that an adapter needs;
            None if unknown.
        run: The run's folder, if the subject is a run or is inside one.
        manifest: The run's manifest; {} without a run.
    """

    name: str
    kind: Literal["base", "run", "adapter", "merged"]
    folder: Path
    base: str
    revision: str | None
    quantization: str | None
    run: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def offload(self) -> str | None:
        """The weights that the run kept in host memory ("experts"); None without offloading or without a run."""
        kept = self.manifest.get("recipe", {}).get("base", {}).get("offload", "none")
        return None if kept == "none" else kept

    @property
    def adapter(self) -> Path | None:
        """The adapter's folder; None for a base or a merged model."""
        return self.folder if self.kind in ("run", "adapter") else None


def find_subject(
    path: str | Path,
    base: str | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    needs_base: bool = True,
) -> Subject:
    """Recognise a path or a Hub id.

    Args:
        base: The base to use in place of the one that a run or an adapter names.
        adapter: A run or an adapter to load onto `path`, which is then a base or a merged model.
        needs_base: Raise AdapterError for an adapter without a known base.

    Raises:
        UserError: There is no such folder, or the run is unfinished.
        AdapterError: The adapter is damaged, or its base is unknown.
    """
    given, name = Path(path), str(path)
    if adapter is not None:
        return _with_adapter(given, name, base, revision, adapter)
    if _is_run(given):
        return _run(given, name, base, revision)
    if (given / CONFIG_FILE).is_file():
        return _adapter(given, name, base, revision, needs_base)
    if base:
        raise UserError(f"--base is for a run or an adapter; {path} is neither.")
    folder = resolve_folder(name, revision)
    if not (folder / MERGE_REPORT_FILE).is_file():
        return Subject(name, "base", folder, name, commit_of(path, folder) or revision, None)
    run, manifest = run_around(folder)
    return Subject(name, "merged", folder, name, commit_of(path, folder) or revision, None, run, manifest)


@contextlib.contextmanager
def naming_base_of(subject: Subject) -> Iterator[None]:
    """Add to the error of a base that is not found which run or adapter names it, and how to give another base."""
    try:
        yield
    except NoCheckpointError as error:
        if subject.adapter is None:
            raise
        raise NoCheckpointError(f"{error} It is the base of {subject.name}; name its folder with --base.") from error


def is_adapted(folder: Path) -> bool:
    """Tell whether a folder is a run or an adapter."""
    return _is_run(folder) or (folder / CONFIG_FILE).is_file()


def run_around(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the run around a folder `adapter` or `merged`, and its manifest; None and {} if there is none."""
    inside = folder.absolute()
    if inside.name not in (ADAPTER_FOLDER, MERGED_FOLDER):
        return None, {}
    try:
        manifest = json.loads((inside.parent / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, {}
    return (inside.parent, manifest) if isinstance(manifest, dict) else (None, {})


def read_manifest(run: Path) -> dict[str, Any]:
    """Read a run's manifest.

    Raises:
        UserError: The manifest is damaged.
    """
    file = run / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        base = manifest["recipe"]["base"]
        base["model"], base["revision"], base["quantization"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r}), so the run's base is unknown.") from error
    return manifest


def trained_in_4_bit(manifest: dict[str, Any]) -> bool:
    """Tell whether the base was in 4 bit in training; True if the manifest does not say."""
    return manifest.get("recipe", {}).get("base", {}).get("quantization", "nf4") == "nf4"


def _is_run(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (MANIFEST_FILE, RECIPE_FILE))


def _with_adapter(given: Path, name: str, base: str | None, revision: str | None, adapter: str | Path) -> Subject:
    if base is not None:
        raise UserError("Give a base with --adapter, or a run or an adapter with --base, but not both options.")
    if is_adapted(given):
        raise UserError(f"--adapter is loaded onto a base or a merged model, but {name} is itself a run or an adapter.")
    if not is_adapted(Path(adapter)):
        raise UserError(f"--adapter {adapter}: is neither a run's folder nor an adapter's.")
    return find_subject(adapter, name, revision)


def _run(folder: Path, name: str, base: str | None, revision: str | None) -> Subject:
    adapter = folder / ADAPTER_FOLDER
    if not (adapter / CONFIG_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{folder}: this run has no adapter yet, so it is unfinished. Finish it with --resume.")
    manifest = read_manifest(folder)
    own = manifest["recipe"]["base"]
    quantization = None if own["quantization"] == "none" else own["quantization"]
    at = revision if base else own["revision"]
    return Subject(name, "run", adapter, base or own["model"], at, quantization, folder, manifest)


def _adapter(folder: Path, name: str, base: str | None, revision: str | None, needs_base: bool) -> Subject:
    stored = read_adapter(folder)
    own = base or stored.config.get("base_model_name_or_path") or ""
    if not own and needs_base:
        raise AdapterError(f"{folder}: does not name its base. Name it with --base.")
    run, manifest = run_around(folder)
    quantization = "nf4" if stored.starts_at_rounding_error else None
    at = revision if base else stored.config.get("revision")
    return Subject(name, "adapter", folder, own, at, quantization, run, manifest)
