"""The model card of a merged folder, written from what the merge and the run recorded."""

import json
from pathlib import Path
from typing import Any

from lola_ft.files import write_text
from lola_ft.merging.report import REPORT_FILE, MergeReport


def write_card(report: MergeReport, base: str, record: dict[str, Any] | None, folder: Path) -> None:
    """Write `README.md`.

    Args:
        base: The base's Hub id, "" if it has none.
        record: The run's manifest, if the adapter lies in a run.
    """
    languages = (record or {}).get("data", {}).get("train", {}).get("languages", {})
    facts = {
        "base": f"{base or 'a local LOLA checkpoint'} (fingerprint `{report.base_fingerprint}`)",
        "adapter": f"LoRA, {report.adapter_tensors} tensors, layout `{report.adapter_layout}`",
        "added to": _added_to(report),
        "weights": f"{report.changed} changed, {report.copied} as in the base, dtype {report.dtype}",
        **_checks(report),
        "training data": ", ".join(f"{language} ({row['kept']:,} rows)" for language, row in languages.items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    # A local folder's path would mean nothing to others.
    header = ["license: cc-by-4.0", "library_name: transformers", "pipeline_tag: text-generation"]
    header += [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"] if base else []
    header += [f"language: {json.dumps(sorted(languages))}"] if languages else []
    text = f"""---
{chr(10).join(header)}
---

# {base.rpartition("/")[2] or "LOLA"}, fine-tuned and merged

LOLA (arXiv 2409.11272) with a LoRA adapter merged into its weights by lola_ft. The proof is in `{REPORT_FILE}`.

| | |
|---|---|
{rows}

Load it:

    import lola_ft  # makes transformers know LOLA
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")

LOLA's weights are CC BY 4.0 by their authors; this model is derived from them.
"""
    write_text(folder / "README.md", text)


def _added_to(report: MergeReport) -> str:
    if report.base_kind == "nf4":
        return "the dequantised 4-bit weights; the original ones were not used"
    return "the original weights" if report.rounding == "base" else "the weights as NF4 rounding leaves them"


def _checks(report: MergeReport) -> dict[str, str]:
    """Lines for what was checked."""
    lines = {}
    if report.weights:
        found = report.weights
        lines["checked in the files"] = (
            f"{found.untouched} tensors equal to the base's, {found.applied_once} of {report.adapter_tensors} adapter "
            f"tensors found exactly once, {len(found.sample)} weights recomputed in whole"
        )
    if report.verification:
        same = report.verification
        lines["logits against base plus adapter"] = (
            f"differ by at most {same.max_logit_difference:.2g} (largest {same.largest_logit:.3g}), same next token at "
            f"{same.top1_agreement:.1%} of {same.tokens} positions"
        )
    return lines
