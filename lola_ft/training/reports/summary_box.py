"""The last that `train` prints: what was trained, what came of it, where it is, and what to do next."""

import json
import shlex
from pathlib import Path
from typing import Any

from rich.box import ROUNDED
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lola_ft.card.render import lora_line
from lola_ft.console import Console, duration
from lola_ft.file_names import ADAPTER_FOLDER, MANIFEST_FILE, METRICS_FILE, REPORT_FILE
from lola_ft.training.reports.metrics import first_and_last, read_metrics


def print_summary(output: Path, console: Console) -> None:
    """Print the box of a finished run; below it its files and the commands that one wants next, a line each to copy."""
    manifest = json.loads((output / MANIFEST_FILE).read_text(encoding="utf-8"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(manifest, read_metrics(output / METRICS_FILE)):
        table.add_row(name, Text(value))  # not as markup: a folder's name may hold brackets
    console.print()
    console.print(Panel(table, title="Done", title_align="left", box=ROUNDED, expand=False))
    console.print(f"Adapter:   {output / ADAPTER_FOLDER}")
    console.print(f"Report:    {output / REPORT_FILE}")
    run = shlex.quote(str(output))
    console.print(f'Ask it:    lola-ft generate {run} --prompt "…"')
    console.print(f"Merge it:  lola-ft merge {run}")
    console.print(f"Share it:  lola-ft publish {run} --repo OWNER/NAME --dry-run")


def summary_rows(manifest: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what was trained, the losses at first and at the end, and the time, as lines of the box."""
    recipe, results = manifest["recipe"], manifest["results"]
    parameters = sum(group["parameters"] for group in manifest["trained"].values())
    rows = [("trained", f"{parameters:,} parameters on {recipe['base']['model']}: {lora_line(recipe)}")]
    for key, name in (("loss", "loss"), ("eval_loss", "validation loss")):
        if ends := first_and_last(metrics, key):
            rows.append((name, f"{ends[0]:.3f} at first, {ends[1]:.3f} at the end"))
    timings = manifest.get("timings", {})
    rows.append(
        ("time", f"{duration(timings.get('train_s', 0))}, {timings.get('tokens_per_s', 0):,.0f} tokens per second")
    )
    if results.get("skipped_steps"):
        rows.append(("skipped", f"{results['skipped_steps']:,} steps, because a number was not finite"))
    return [*rows, ("steps", f"{results['steps']:,}")]
