"""The `merge` verb: finds base and output of a run, merges, says what was done."""

from pathlib import Path

from rich.console import Console

from lola_ft.adapters.files import CONFIG_FILE, read_adapter
from lola_ft.errors import UserError
from lola_ft.merging.merge import MergeReport, merge
from lola_ft.recipe import load_recipe


def merge_command(
    run_or_adapter: str, base: str | None, out: str | None, dtype: str, rounding: str, allow_other_base: bool
) -> None:
    """Merge a run's or a folder's adapter; see `lola_ft.merge` for the options."""
    folder = Path(run_or_adapter)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a run folder or an adapter's folder.")
    adapter, own_base, revision = _locate(folder)
    base = base or own_base
    if not base:
        raise UserError(f"{adapter}: does not say which base it belongs to. Give it with --base.")
    if not out and adapter == folder:
        raise UserError("Give the folder to write with --out. (Only a run has a default, RUN/merged.)")
    target = Path(out) if out else folder / "merged"
    report = merge(base, adapter, target, dtype, rounding, revision=revision, allow_other_base=allow_other_base)
    _say(report, target)


def _locate(folder: Path) -> tuple[Path, str, str | None]:
    """The adapter's folder, its base and the base's revision, as far as the run or the adapter tells."""
    if (folder / "recipe.yaml").is_file():
        if not (folder / "adapter" / CONFIG_FILE).is_file():
            raise UserError(f"{folder}: this run has no adapter yet. Did the run end?")
        recipe = load_recipe(folder / "recipe.yaml")
        return folder / "adapter", recipe.base.model, recipe.base.revision
    adapter = read_adapter(folder)
    return folder, adapter.config.get("base_model_name_or_path") or "", None


def _say(report: MergeReport, target: Path) -> None:
    console = Console()
    console.print(
        f"{report.applied} of {report.adapter_tensors} adapter tensors applied; {report.changed} weights changed, "
        f"{report.copied} copied as they were."
    )
    if report.rounded:
        console.print(f"{report.rounded} more were written as 4-bit rounding leaves them.")
    if report.dropped:
        console.print(f"Left out {len(report.dropped)} legacy tensors: {', '.join(report.dropped[:3])}.")
    if proof := report.verification:
        console.print(
            f"Reloaded and compared on {proof.compared} of {proof.tokens} tokens in {proof.dtype}: largest logit "
            f"difference between merged and base plus adapter {proof.max_logit_difference:.3g} (largest logit "
            f"{proof.largest_logit:.3g}), same next token at {proof.top1_agreement:.1%} of positions."
        )
        if proof.compared < proof.tokens:
            console.print("The other tokens come with or after one that rounding sent to another expert.")
    console.print(f"The merged model is in {target}; the proof in {target / 'merge_report.json'}.")
