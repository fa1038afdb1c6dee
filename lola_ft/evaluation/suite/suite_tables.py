"""Tables of a suite: the tasks to run, and their results."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from rich.table import Table
from rich.text import Text

from lola_ft.evaluation.suite.benchmarks import Benchmark, Chosen

_OWN = Benchmark("own", "tasks of your own", "{}", ())


def plan_table(chosen: list[Chosen], missing: list[str]) -> Table:
    """Make a table of the benchmarks with the harness's tasks, including renamed and missing tasks."""
    table = Table(title="Tasks to run", title_justify="left")
    for heading in ("category", "benchmark", "tasks of the harness", "languages"):
        table.add_column(heading, overflow="fold")
    for benchmark, group in _groups(chosen).items():
        names = [one.task if one.task == one.wanted else f"{one.task} (for {one.wanted})" for one in group]
        shown = ", ".join(names) if len(names) < 4 or benchmark is _OWN else f"{names[0]}, … {names[-1]}"
        table.add_row(benchmark.category, benchmark.name, shown, str(len(group)))
    if missing:
        table.add_row("", "", Text(f"not in this version: {', '.join(missing)}", style="red"), str(len(missing)))
    return table


def result_table(by_model: Mapping[str, Mapping[str, Any]], chosen: list[Chosen]) -> Table:
    """Make a table of each benchmark's mean over its languages, with the harness's standard error."""
    table = Table(title="Mean over languages, ± standard error", title_justify="left")
    for heading in ("category", "benchmark", "metric", "languages"):
        table.add_column(heading)
    for model in by_model:
        table.add_column(Text(model), justify="right", overflow="fold")
    for benchmark, group in _groups(chosen).items():
        parts = [[one] for one in group] if benchmark is _OWN else [group]
        for part in parts:
            results = [[found[one.task] for one in part if one.task in found] for found in by_model.values()]
            name, metric = benchmark.name, benchmark.metric
            if benchmark is _OWN:
                name, metric = part[0].task, _main_metric([one for found in results for one in found])
            table.add_row(benchmark.category, name, metric, str(len(part)), *(mean(found, metric) for found in results))
    return table


def _main_metric(results: list[Mapping[str, Any]]) -> str:
    """Return the metric to show for a user's own task: accuracy if it has one, else its first metric."""
    names = [key.split(",")[0] for result in results for key in result["metrics"] if "_stderr," not in key]
    return names[0] if names and _OWN.metric not in names else _OWN.metric


def mean(results: list[Mapping[str, Any]], metric: str) -> str:
    """Return a metric's mean over tasks as a percentage, with its standard error."""
    found = [value for result in results if (value := metric_of(result["metrics"], metric)) is not None]
    if not found:
        return "–"
    average = sum(one for one, _ in found) / len(found)
    spread = sqrt(sum(error**2 for _, error in found)) / len(found)
    return f"{average:.1%} ± {100 * spread:.1f}"


def metric_of(metrics: Mapping[str, float], metric: str) -> tuple[float, float] | None:
    """Return a metric and its standard error; for several ways of reading an answer, that of `flexible-extract`."""
    keys = sorted(key for key in metrics if key.split(",")[0] == metric)
    if not keys:
        return None
    key = next((key for key in keys if key.endswith("flexible-extract")), keys[0])
    return metrics[key], metrics.get(key.replace(f"{metric},", f"{metric}_stderr,"), 0.0)


def _groups(chosen: list[Chosen]) -> dict[Benchmark, list[Chosen]]:
    groups: dict[Benchmark, list[Chosen]] = {}
    for one in chosen:
        groups.setdefault(one.benchmark or _OWN, []).append(one)
    return groups
