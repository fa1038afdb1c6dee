"""What a card says of a merge, from its report."""

from typing import Any


def merge_rows(report: dict[str, Any]) -> list[list[str]]:
    """Rows of the card's table; what the report does not hold is left out."""
    rows = [
        ["merged", f"{report.get('applied')} of {report.get('adapter_tensors')} adapter tensors{_replaced(report)}"]
    ]
    if layout := report.get("adapter_layout"):
        rows.append(["adapter's layout", f"`{layout}`"])
    rows.append(["merged into", _added_to(report)])
    if "changed" in report:
        rounded = f", {report['rounded']} more as NF4 rounding leaves them" if report.get("rounded") else ""
        counts = f"{report['changed']} changed{rounded}, {report['copied']} as in the base"
        rows.append(["weights", f"{counts}, dtype {report['dtype']}"])
    return rows + _checks(report)


def _replaced(report: dict[str, Any]) -> str:
    replaced, biases = report.get("replaced", 0), report.get("biases", 0)
    of_biases = f" ({biases} biases)" if biases else ""
    return f"; {replaced} of them are weights trained as they are{of_biases}" if replaced else ""


def _added_to(report: dict[str, Any]) -> str:
    if report.get("base_kind") == "nf4":
        return "the dequantised 4-bit weights; the original ones were not used"
    return "the weights as NF4 rounding leaves them" if report.get("rounding") == "nf4" else "the original weights"


def _checks(report: dict[str, Any]) -> list[list[str]]:
    """What was checked; where it is proved in full is the report itself."""
    rows = []
    if found := report.get("weights"):
        what = (
            f"{found['untouched']} tensors equal to the base's, {found['applied_once']} of {report['adapter_tensors']} "
            f"adapter tensors found exactly once, {len(found['sample'])} weights recomputed in whole "
            "(`merge_report.json`)"
        )
        rows.append(["checked in the files", what])
    if same := report.get("verification"):
        what = (
            f"differ by at most {same['max_logit_difference']:.2g} (largest {same['largest_logit']:.3g}), same next "
            f"token at {same['top1_agreement']:.1%} of {same['tokens']} positions"
        )
        rows.append(["logits against base plus adapter", what])
    return rows
