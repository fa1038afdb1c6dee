"""The part of a merge's check that needs whole models: the logits, and the effects of rounding on them."""

from dataclasses import replace
from pathlib import Path

import torch

from lola_ft.adapters.on_disk import StoredAdapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.merging.effects import measure_effects
from lola_ft.merging.merge_base import MergeBase
from lola_ft.merging.merge_report import MergeReport
from lola_ft.merging.outputs import Models, compute_dtype, too_large
from lola_ft.merging.verify import compare
from lola_ft.subject import run_around, trained_in_4_bit


def compare_models(report: MergeReport, base: MergeBase, stored: StoredAdapter, folder: Path) -> MergeReport:
    """Return the report with the comparison of logits and the effects of rounding, or the reason why they are missing.

    Raises:
        AdapterError: If the merged model differs from base plus adapter by more than rounding explains.
    """
    merged = BaseCheckpoint.open(folder)
    places = merged.architecture.places
    weights_dtype = next(entry.dtype for name, entry in merged.entries.items() if places[name].quantized)
    parameters = sum(torch.Size(entry.shape).numel() for entry in merged.entries.values())
    compute = compute_dtype(parameters, weights_dtype)
    if reason := too_large(parameters, compute):
        return replace(report, skipped=reason)
    models = Models(base.folder, stored.folder, folder, compute)
    original = base.kind == "checkpoint" and not stored.starts_at_rounding_error
    saw_4_bit = report.rounding == "nf4" or trained_in_4_bit(run_around(stored.folder)[1])
    on_4_bit = models.adapted("nf4") if saw_4_bit else None
    on_original = models.adapted(None) if original else None
    result = models.merged_alone()
    reference = on_4_bit if report.rounding == "nf4" else on_original
    assert reference is not None, "what the merged model is compared with was not run"
    verification = compare(reference, result, weights_dtype)
    return replace(report, verification=verification, effects=measure_effects(result, on_4_bit, on_original))
