"""Merging of an adapter into the weights on disk: tensor by tensor, in the base's layout, as a whole or not at all."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from lola_ft.adapters.on_disk import StoredAdapter, read_adapter
from lola_ft.card import read_terms
from lola_ft.card.stages import stages_in
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import resolve_folder
from lola_ft.errors import AdapterError, CheckpointError, UserError
from lola_ft.file_names import MERGE_REPORT_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from lola_ft.files import check_new_folder, replace_folder, write_text
from lola_ft.kernels.precision import DTYPES
from lola_ft.merging.companions import copy_companions, write_config
from lola_ft.merging.deltas import Deltas
from lola_ft.merging.grown_base import GrownBase
from lola_ft.merging.merge_base import CheckpointBase, MergeBase
from lola_ft.merging.merge_report import MergeReport
from lola_ft.merging.merged_card import write_card
from lola_ft.merging.proof import prove
from lola_ft.merging.stream import Written, write_weights
from lola_ft.repo_id import is_repo_id
from lola_ft.standalone.own_code import complete_folder
from lola_ft.subject import run_around

ROUNDINGS = ("base", "nf4")
CHECKS = ("full", "weights", "none")


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: str = "auto",
    rounding: str | None = None,
    revision: str | None = None,
    allow_other_base: bool = False,
    check: bool | str = True,
) -> MergeReport:
    """Write base plus adapter as a checkpoint in the base's layout, with the tokenizer, and prove it from the files.

    Args:
        base: The folder or Hub id of a base of any family, or the folder of a quantised base from `lola-ft quantize`.
        adapter: An adapter's folder, in either layout.
        out: Folder to write; must not exist or be empty.
        dtype: Dtype of the merged weights: `auto` (the base's own), float32, bfloat16 or float16.
        rounding: `base` adds the update to the original weights, `nf4` to the weights after 4-bit rounding, as in
            4-bit training. None means `base` if the original weights are available.
        revision: Branch, tag or commit of a base on the Hub.
        allow_other_base: Accept an adapter that was trained on other base weights.
        check: `full` (or True) compares the written weights with base and adapter, then loads both models and compares
            their logits, if they fit in memory. `weights` skips the logits. `none` (or False) checks nothing.

    Raises:
        AdapterError: If the adapter does not fit, or would change nothing.
        CheckpointError: If the base is damaged, or the written files are wrong.
        UserError: If `out` is in use, or an option is unknown.
    """
    checks = check if isinstance(check, str) else ("full" if check else "none")
    _check_options(dtype, rounding, checks, out)
    stored = read_adapter(adapter)
    source = _open_base(base, revision, _own_rounding(stored, rounding), stored)
    source = GrownBase.grow(source, stored.vocabulary(source.architecture.sizes.vocab))
    own, other = source.fingerprint, stored.metadata.get("base_fingerprint")
    if other not in (None, own) and not allow_other_base:
        raise AdapterError(
            f"{adapter} was trained on base {other}; {base} is {own}. Merge it with its own base, or pass "
            "--allow-other-base."
        )
    deltas = Deltas(stored, source)
    deltas.outline.check_fit()
    with replace_folder(out) as folder:
        written = write_weights(source, deltas, folder, DTYPES.get(dtype), checksums=checks != "none")
        record = run_around(stored.folder)[1]
        report = replace(_report(source, stored, deltas, written, dtype), stages=stages_in(record))
        _write_index(source, written, folder)
        write_config(source, folder, "" if Path(base).exists() else str(base), _written_dtype(source, dtype))
        copy_companions(source.folder, stored.folder, folder)
        report = replace(report, other_code=complete_folder(source.architecture.family, folder))
        if checks != "none":
            report = replace(report, weights=prove(source, stored, folder, DTYPES.get(dtype), written.checksums))
        if checks == "full":
            report = _compare_models(report, source, stored, folder)
        origin = "" if Path(base).exists() else str(base)
        family = source.architecture.family
        terms = read_terms(source.folder)
        write_card(report, origin or _base_id(stored), family, terms, record, folder)
        write_text(folder / MERGE_REPORT_FILE, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _check_options(dtype: str, rounding: str | None, check: str, out: str | Path) -> None:
    if rounding is not None and rounding not in ROUNDINGS:
        raise UserError(f"rounding '{rounding}' is not known; use one of {', '.join(ROUNDINGS)}.")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not known; use auto or one of {', '.join(DTYPES)}.")
    if check not in CHECKS:
        raise UserError(f"check '{check}' is not known; use one of {', '.join(CHECKS)}.")
    check_new_folder(out)


def _own_rounding(stored: StoredAdapter, rounding: str | None) -> str | None:
    """Return the rounding that was asked for, or else the only one that this adapter allows, if there is only one.

    Raises:
        UserError: If the adapter does not allow the rounding that was asked for.
    """
    if not stored.starts_at_rounding_error:
        return rounding
    if rounding == "base":
        raise UserError(
            f"{stored.folder}: this adapter started at the rounding error of the 4-bit base (init loftq), so adding it "
            "to the original weights would correct an error that is not there. Use --rounding nf4."
        )
    return "nf4"


def _open_base(base: str | Path, revision: str | None, rounding: str | None, stored: StoredAdapter) -> MergeBase:
    """Open the base's checkpoint; or its 4-bit form, if that was given or is the only one available.

    Raises:
        UserError: If `rounding` asks for original weights that are not available.
    """
    four_bit = Path(base)
    if not (four_bit / "nf4.safetensors").is_file():
        try:
            folder = resolve_folder(base, revision)
        except CheckpointError:
            # Imported late, because it imports bitsandbytes.
            from lola_ft.quantization.cache import caches_of

            caches = caches_of(stored.metadata.get("base_fingerprint") or "none")
            if not caches:
                raise
            four_bit = caches[0]
        else:
            return CheckpointBase.open(BaseCheckpoint.open(folder), rounding or "base")
    if rounding == "base":
        raise UserError(
            f"{base}: the original weights are not here, only their 4-bit form ({four_bit}), so --rounding base has "
            "nothing to add to. Give the original base with --base, or leave --rounding out."
        )
    from lola_ft.merging.quantized_base import QuantizedBase

    return QuantizedBase.open(four_bit)


def _report(base: MergeBase, stored: StoredAdapter, deltas: Deltas, written: Written, dtype: str) -> MergeReport:
    """Return the report of the written weights.

    Raises:
        AdapterError: If a tensor of the adapter was merged more or less than once, or if nothing changed.
    """
    expected = deltas.outline.tensor_count()
    once = sum(count == 1 for count in written.applied.values())
    if once != expected or len(written.applied) != expected:
        raise AdapterError(f"Only {once} of {expected} adapter tensors were merged exactly once.")
    largest = max(written.changes.values(), default=0.0)
    if largest == 0:
        raise AdapterError(
            "The adapter changes nothing: its update is all zeros, or too small for the output dtype. Was it trained? "
            "Nothing was written."
        )
    changed = {name for name, change in written.changes.items() if change > 0}
    rounded = sum(base.is_rounded(name) and name not in changed for name in base.entries)
    return MergeReport(
        base_fingerprint=base.fingerprint,
        base_kind=base.kind,
        adapter_layout=stored.layout,
        dtype=dtype,
        rounding="nf4" if base.rounded else "base",
        adapter_tensors=expected,
        applied=once,
        changed=len(changed),
        rounded=rounded,
        copied=len(base.entries) - len(changed) - rounded,
        dropped=base.ignored,
        largest_change=largest,
        replaced=len(deltas.outline.trained),
        biases=len(deltas.outline.biases()),
    )


def _compare_models(report: MergeReport, base: MergeBase, stored: StoredAdapter, folder: Path) -> MergeReport:
    """Load base plus adapter and the merged model, one after another, and compare them; or report why not."""
    # Imported late, so that a merge without this comparison does not import the code that loads models.
    from lola_ft.merging.models import compare_models

    return compare_models(report, base, stored, folder)


def _written_dtype(base: MergeBase, dtype: str) -> str:
    own = base.entries[base.architecture.family.embeddings[0]].dtype
    return dtype if dtype != "auto" else str(own).removeprefix("torch.")


def _base_id(stored: StoredAdapter) -> str:
    """Return the Hub id that the adapter names as its base; "" for a local path, which other machines do not have."""
    name = str(stored.config.get("base_model_name_or_path") or "")
    return name if is_repo_id(name) and not Path(name).exists() else ""


def _write_index(base: MergeBase, written: Written, folder: Path) -> None:
    if [file for file, _ in base.shards] != [WEIGHTS_FILE]:
        index = {"metadata": {"total_size": written.num_bytes}, "weight_map": written.weight_map}
        write_text(folder / WEIGHTS_INDEX_FILE, json.dumps(index, indent=2) + "\n")
