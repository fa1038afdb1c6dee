"""The `merge` verb: find base and output of a run, merge, and print what was done."""

from pathlib import Path

from lola_ft.console import Console
from lola_ft.errors import UserError
from lola_ft.file_names import MERGE_REPORT_FILE, MERGED_FOLDER
from lola_ft.files import missing
from lola_ft.merging.effects import advice, effects_table
from lola_ft.merging.merge import merge
from lola_ft.merging.merge_report import MergeReport
from lola_ft.merging.proof import WeightProof
from lola_ft.merging.verify import Verification
from lola_ft.subject import find_subject, is_adapted, naming_base_of


def merge_command(
    run_or_adapter: str,
    base: str | None,
    out: str | None,
    dtype: str,
    rounding: str | None,
    allow_other_base: bool,
    check: str,
) -> None:
    """Merge the adapter of a run or a folder; see `lola_ft.merge` for the options."""
    folder = Path(run_or_adapter)
    if not folder.is_dir():
        raise UserError(f"{missing(folder, 'folder')} Give a run folder or an adapter's folder.")
    if not is_adapted(folder):
        raise UserError(f"{folder}: is neither a run's folder nor an adapter's. To name a base, use --base.")
    subject = find_subject(folder, base)
    if not out and subject.kind != "run":
        raise UserError("Give the folder to write with --out. (Only a run has a default: RUN/merged.)")
    target = Path(out) if out else folder / MERGED_FOLDER
    with naming_base_of(subject):
        report = merge(subject.base, subject.folder, target, dtype, rounding, subject.revision, allow_other_base, check)
    _say(report, target)


def _say(report: MergeReport, target: Path) -> None:
    console = Console()
    if report.base_kind == "nf4":
        console.print(
            "Merged into a 4-bit base, because the original weights are not here. To merge into the original weights, "
            "give their folder or Hub id with --base."
        )
    console.print(
        f"{report.applied} of {report.adapter_tensors} adapter tensors applied; {report.changed} weights changed, "
        f"{report.copied} copied unchanged."
    )
    if report.rounded:
        console.print(f"{report.rounded} more were rounded to NF4.")
    if report.dropped:
        console.print(f"Left out {len(report.dropped)} legacy tensors: {', '.join(report.dropped[:3])}.")
    if report.other_code:
        console.print(f"Kept the base's own {', '.join(report.other_code)}; config.json now names lola_ft's code.")
    if report.weights:
        _say_weights(report.weights, report, console)
    if report.skipped:
        console.print(f"Logits were not compared: {report.skipped}.")
    if report.verification:
        _say_logits(report.verification, console)
    if report.effects:
        console.print(effects_table(report.effects, report.rounding))
        if hint := advice(report.effects):
            console.print(hint)
    console.print(f"The merged model is in {target}; the proof is in {target / MERGE_REPORT_FILE}.")


def _say_weights(proof: WeightProof, report: MergeReport, console: Console) -> None:
    console.print(
        f"Checked in the written files: {proof.untouched} tensors equal the base's bit by bit; {proof.applied_once} of "
        f"{report.adapter_tensors} adapter tensors are applied exactly once ({proof.rows} rows of {proof.touched} "
        f"weights recomputed). {len(proof.sample)} weights recomputed completely differ by at most "
        f"{proof.largest_error:.0%} of what rounding allows. After subtracting the update, "
        f"{proof.unmerged_exactly:.1%} of their values equal the base's; the others differ only by rounding."
    )
    if proof.without_update:
        console.print(
            f"For {len(proof.without_update)} weights the adapter's update is zero, for example because training sent "
            f"no token to an expert: {', '.join(proof.without_update[:3])}."
        )
    if proof.below_rounding:
        wider = "" if report.dtype == "float32" else "; --dtype float32 would keep it"
        console.print(
            f"In {len(proof.below_rounding)} weights the update is smaller than the rounding of the output dtype, in "
            f"the rows checked{wider}."
        )


def _say_logits(proof: Verification, console: Console) -> None:
    console.print(
        f"Reloaded and compared on {proof.compared} of {proof.tokens} tokens in {proof.dtype}: largest logit "
        f"difference between merged and base plus adapter {proof.max_logit_difference:.3g} (largest logit "
        f"{proof.largest_logit:.3g}), same next token at {proof.top1_agreement:.1%} of positions."
    )
    if proof.compared < proof.tokens:
        console.print("The other tokens were left out: rounding sent them, or a token before them, to another expert.")
