"""The thing that a user points at, recognised as a base, a run, an adapter or a merged model: for every verb."""

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
        name: As the user wrote it, and as tables show it.
        folder: The folder of its own files: the adapter's for a run or an adapter, else the model's.
        base: Folder or Hub id of the weights to load first; for a base or a merged model, its own name. "" if
            neither run nor adapter names it and it was not needed.
        revision: The commit of a base on the Hub, where it is known; else what the user, the run or the adapter names.
        quantization: The form of the base that a run trained on ("nf4" or None) or that an adapter needs; None where
            neither says it.
        run: The run that it is, or in which it lies.
        manifest: The run's manifest, {} without a run.
        offload: What a run kept in host memory: "experts" or None.
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
        kept = self.manifest.get("recipe", {}).get("base", {}).get("offload", "none")
        return None if kept == "none" else kept

    @property
    def adapter(self) -> Path | None:
        """Return the adapter's folder, if there is one."""
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
        base: The base to use instead of the one that a run or an adapter names.
        adapter: A run or an adapter to put on `path`, which is then a base or a merged model.
        needs_base: Refuse an adapter whose base nothing names.

    Raises:
        UserError: No such folder, or a run that did not end.
        AdapterError: A damaged adapter, or one whose base nothing names.
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
    """Say of a base that is not found which run or adapter names it, and how to give another place."""
    try:
        yield
    except NoCheckpointError as error:
        if subject.adapter is None:
            raise
        raise NoCheckpointError(f"{error} It is the base of {subject.name}; give its place with --base.") from error


def is_adapted(folder: Path) -> bool:
    """Tell whether a folder is a run's or an adapter's."""
    return _is_run(folder) or (folder / CONFIG_FILE).is_file()


def run_around(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the run that a folder `adapter` or `merged` lies in, and its manifest; None and {} without one."""
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
        UserError: It is damaged.
    """
    file = run / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        base = manifest["recipe"]["base"]
        base["model"], base["revision"], base["quantization"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r}); it does not tell the run's base.") from error
    return manifest


def trained_in_4_bit(manifest: dict[str, Any]) -> bool:
    """Tell whether training saw a 4-bit base; assumed where no manifest says otherwise."""
    return manifest.get("recipe", {}).get("base", {}).get("quantization", "nf4") == "nf4"


def _is_run(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (MANIFEST_FILE, RECIPE_FILE))


def _with_adapter(given: Path, name: str, base: str | None, revision: str | None, adapter: str | Path) -> Subject:
    if base is not None:
        raise UserError("Give a base and --adapter, or a run or an adapter and --base; not both.")
    if is_adapted(given):
        raise UserError(f"--adapter goes on a base or a merged model; {name} is a run or an adapter itself.")
    if not is_adapted(Path(adapter)):
        raise UserError(f"{adapter}: is neither a run's folder nor an adapter's.")
    return find_subject(adapter, name, revision)


def _run(folder: Path, name: str, base: str | None, revision: str | None) -> Subject:
    adapter = folder / ADAPTER_FOLDER
    if not (adapter / CONFIG_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{folder}: this run has no adapter yet. Did the run end? Resume it with --resume.")
    manifest = read_manifest(folder)
    own = manifest["recipe"]["base"]
    quantization = None if own["quantization"] == "none" else own["quantization"]
    at = revision if base else own["revision"]
    return Subject(name, "run", adapter, base or own["model"], at, quantization, folder, manifest)


def _adapter(folder: Path, name: str, base: str | None, revision: str | None, needs_base: bool) -> Subject:
    stored = read_adapter(folder)
    own = base or stored.config.get("base_model_name_or_path") or ""
    if not own and needs_base:
        raise AdapterError(f"{folder}: does not say which base it belongs to. Give it with --base.")
    run, manifest = run_around(folder)
    quantization = "nf4" if stored.starts_at_rounding_error else None
    at = revision if base else stored.config.get("revision")
    return Subject(name, "adapter", folder, own, at, quantization, run, manifest)
