"""The folder that is sent: selected files of the source, rewritten if they name this machine."""

import io
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.layouts import CONFIG_FILE, PREFIX
from lola_ft.adapters.on_disk import WEIGHTS_FILE, read_adapter
from lola_ft.card import BaseTerms, CardFacts, read_terms, render_card
from lola_ft.checkpoints.folder import CONFIG_FILE as MODEL_CONFIG_FILE
from lola_ft.checkpoints.folder import TEMPLATE_FILE, TERMS_FILES, weight_files
from lola_ft.errors import PublishError
from lola_ft.families import FAMILIES, Family, find_family, recorded_family
from lola_ft.file_names import (
    CARD_FILE,
    LANGUAGES_PLOT,
    LOSS_PLOT,
    MANIFEST_FILE,
    MERGE_REPORT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    ROUTING_PLOT,
)
from lola_ft.hub.publication import Base, Source, read_json

_HEADER = "# The recipe of this model. Local files are named without their folders.\n"
LIST_FILE = "published.json"
"""A list of the files of a publication, which lets the next publication tell them from the owner's own files."""

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "prompt_template.jinja"),
)
_MERGED = ("generation_config.json", "modeling_*.py", "configuration_*.py", MERGE_REPORT_FILE, *TERMS_FILES)
_RUN = (METRICS_FILE, LOSS_PLOT, LANGUAGES_PLOT, ROUTING_PLOT)
# Keys in which libraries store where a file was made; no code reads them.
_TRACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_MANIFEST_KEYS = (
    "versions", "hardware", "base", "trained", "data", "stages", "results", "timings", "memory", "routing", "energy",
)  # fmt: skip


@dataclass(frozen=True)
class Staged:
    """A folder ready to be sent.

    Attributes:
        files: Names of all files.
        left_out: Names in the source that are not sent.
        terms: The base's terms of use.
    """

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    terms: BaseTerms


def stage(source: Source, base: Base, repo: str, layout: str | None, folder: Path) -> Staged:
    """Fill the new folder `folder`. An adapter is converted to `layout`; None keeps its own layout."""
    if source.kind == "adapter":
        _stage_adapter(source, base, layout or source.layout, folder)
    else:
        if layout:
            raise PublishError(f"{source.folder}: merged weights have no adapter layout. Leave out --layout.")
        _stage_merged(source, folder)
    if source.run is not None and source.kind == "adapter":
        _stage_run(source.run, source.manifest, base, folder)
    names = {file.name for file in folder.iterdir()} | {CARD_FILE, LIST_FILE}
    stored = read_adapter(folder) if source.kind == "adapter" else None
    terms = _terms_of(source, base)
    facts = CardFacts(
        title=repo.partition("/")[2],
        kind=source.kind,
        location=repo,
        published=True,
        base=base.id,
        family=_family_of(source, base),
        terms=terms,
        base_revision=base.revision,
        layout=(layout or source.layout) if source.kind == "adapter" else None,
        stock_peft=stored is not None and stored.loads_with_stock_peft,
        rows=stored.rows if stored else 0,
        manifest=source.manifest,
        merge_report=read_json(folder / MERGE_REPORT_FILE) if MERGE_REPORT_FILE in names else {},
        files=tuple(sorted(names)),
    )
    (folder / CARD_FILE).write_text(render_card(facts), encoding="utf-8")
    _write_json(folder / LIST_FILE, {"made_with": "lola_ft", "files": sorted(names)})
    return Staged(folder, tuple(sorted(names)), tuple(_left_out(source, names)), terms)


def _terms_of(source: Source, base: Base) -> BaseTerms:
    """Return the base's terms from its card or, if it has none, from the card of the merged weights."""
    terms = read_terms(base.folder)
    return read_terms(source.folder) if terms == BaseTerms() and source.kind == "merged" else terms


def _family_of(source: Source, base: Base) -> Family | None:
    """Return the base's family, from the config of the merged model or the base, the run's manifest, or the tensors.

    Returns None if there is neither config nor manifest and the adapter's tensors fit several families.
    """
    folder = source.folder if source.kind == "merged" else base.folder
    if folder is not None and (folder / MODEL_CONFIG_FILE).is_file():
        return find_family(read_json(folder / MODEL_CONFIG_FILE).get("model_type"), folder / MODEL_CONFIG_FILE)
    if source.manifest:
        return recorded_family(source.manifest.get("base", {}).get("family"))
    entries = read_adapter(source.folder).entries
    modules = [name.removeprefix(PREFIX).partition(".lora_")[0] for name in entries if ".lora_" in name]
    fitting = [family for family in FAMILIES.values() if all(map(family.takes_lora, modules))]
    return fitting[0] if len(fitting) == 1 else None


def _left_out(source: Source, names: set[str]) -> list[str]:
    left = {file.name for file in source.folder.iterdir()} - names
    if source.run is not None and source.kind == "adapter":
        left |= {file.name for file in source.run.iterdir()} - names - {source.folder.name}
    return sorted(left)


def _stage_adapter(source: Source, base: Base, layout: str | None, folder: Path) -> None:
    if layout == source.layout:
        folder.mkdir(parents=True)
        _link(source.folder / WEIGHTS_FILE, folder)
        _link(source.folder / CONFIG_FILE, folder)
        _copy_matching(source.folder, folder, _TOKENIZER)
    else:
        if base.folder is None:
            raise PublishError(
                f"{source.folder}: to convert it to layout '{layout}', its base {base.id} must be on this machine. "
                "Name the base's folder with --base."
            )
        convert_adapter(source.folder, base.folder, str(layout), folder)
    config = read_json(folder / CONFIG_FILE)
    commit = base.revision if base.revision != "main" else None
    (folder / CONFIG_FILE).unlink()
    _write_json(folder / CONFIG_FILE, config | {"base_model_name_or_path": base.id, "revision": commit})


def _stage_merged(source: Source, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights = weight_files(source.folder)
    for file in weights:
        _link(file, folder)
    if weights[0].name != "model.safetensors":
        _link(source.folder / "model.safetensors.index.json", folder)
    _copy_matching(source.folder, folder, ("config.json", *_MERGED, *_TOKENIZER))


def _stage_run(run: Path, manifest: dict[str, Any], base: Base, folder: Path) -> None:
    text = (run / RECIPE_FILE).read_text(encoding="utf-8")
    (folder / RECIPE_FILE).write_text(portable_recipe(text, base.id, base.revision), encoding="utf-8")
    kept = {key: manifest[key] for key in _MANIFEST_KEYS if key in manifest}
    if "base" in kept:
        kept["base"] = kept["base"] | {"id": base.id}
    if hashes := kept.get("data", {}).get("sha256"):
        kept["data"] = kept["data"] | {"sha256": {Path(path).name: digest for path, digest in hashes.items()}}
    _write_json(folder / MANIFEST_FILE, kept)
    _copy_matching(run, folder, _RUN)


def _copy_matching(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for file in sorted(source.iterdir()):
        if not file.is_file() or not any(fnmatch(file.name, pattern) for pattern in patterns):
            continue
        if file.suffix == ".json" and (content := _without_traces(file)) is not None:
            _write_json(folder / file.name, content)
        else:
            _link(file, folder)


def _without_traces(file: Path) -> dict[str, Any] | None:
    """Return the file's content without traces of this machine; None if it has none and can be sent unchanged."""
    if file.name not in ("config.json", "generation_config.json", "tokenizer_config.json"):
        return None
    content = read_json(file)
    return {k: v for k, v in content.items() if k not in _TRACES} if content.keys() & set(_TRACES) else None


def _link(file: Path, folder: Path) -> None:
    """Link a file into the folder; a copy of weights could be many gigabytes."""
    (folder / file.name).symlink_to(file.resolve())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def portable_recipe(text: str, base_id: str, base_revision: str | None) -> str:
    """Rewrite a run's `recipe.yaml` with the base's Hub id, and without folders and the `hub` section."""
    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    recipe = yaml.load(text)
    recipe["base"]["model"] = base_id
    if base_revision:
        recipe["base"]["revision"] = base_revision
    data = recipe["data"]
    validation = data.get("validation")
    for source in [*data["sources"], *(validation if isinstance(validation, list) else [])]:
        if "path" in source:
            source["path"] = _name(source["path"])
    if data.get("template", "").endswith(".jinja"):
        data["template"] = TEMPLATE_FILE
    adapter = recipe.get("adapter", {})
    if "continue_from" in adapter and "revision" not in adapter:  # a folder
        adapter["continue_from"] = _name(adapter["continue_from"])
    experts: dict[str, Any] = adapter.get("experts") or {}
    if isinstance(experts.get("select"), str):
        experts["select"] = _name(experts["select"])
    recipe["output"] = _name(recipe["output"])
    recipe.pop("hub", None)
    stream = io.StringIO()
    yaml.dump(recipe, stream)
    return _HEADER + re.sub(r"\A(#.*\n)+", "", stream.getvalue())


def _name(path: str) -> str:
    return Path(path).name or "run"
