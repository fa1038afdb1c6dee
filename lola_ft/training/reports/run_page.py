"""A run on one page: `report.html`, written from its manifest and metrics like the card. It needs no other file.

Paths of the machine are cut to their last name: the page is made to be sent to others.
"""

import io
import re
from pathlib import Path
from typing import Any

import jinja2
from ruamel.yaml import YAML

from lola_ft.card.render import lora_line
from lola_ft.card.stages import STAGE_HEADER, stage_rows
from lola_ft.console import counted, duration
from lola_ft.data.task_formats import language_name
from lola_ft.file_names import REPORT_FILE
from lola_ft.files import write_text
from lola_ft.training.reports.metrics import BY_LANGUAGE, DEAD, ENTROPY, FLIP_RATE, SHARE, first_and_last
from lola_ft.training.reports.svg_chart import Points, line_chart

Metrics = list[dict[str, Any]]

_LANGUAGES_DRAWN = 8
_ABSOLUTE = re.compile(
    r"(?<![\w:/.…])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"<>,;:()\[\]{}/\\]+[/\\])+([^\s'\"<>,;:()\[\]{}/\\]+)"
)
"""An absolute path with its last name; an address (`https://…`) is none."""


def write_run_page(output: Path, manifest: dict[str, Any], metrics: Metrics) -> None:
    """Write `report.html` into the run folder."""
    write_text(output / REPORT_FILE, render_run_page(output.name, manifest, metrics))


def render_run_page(title: str, manifest: dict[str, Any], metrics: Metrics) -> str:
    """Return the page's HTML; a part about which nothing is known is left out."""
    manifest, metrics = without_places(manifest), without_places(metrics)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "language": language_name}
    template = environment.get_template("run_page.html.jinja")
    return template.render(
        title=title,
        manifest=manifest,
        summary=_summary(manifest, metrics),
        stages=_stages(manifest),
        languages=_languages(manifest),
        charts=[chart for chart in _charts(manifest, metrics) if chart[1]],
        routing=_flat(manifest.get("results", {}).get("routing", {})),
        guards=_guards(manifest, metrics),
        measured={name: _flat(manifest[name]) for name in ("timings", "memory", "energy") if name in manifest},
        environment=_flat(manifest.get("versions", {})) + _flat(manifest.get("hardware", {})) + _code(manifest),
        recipe=_yaml(manifest.get("recipe", {})),
    )


def without_places(value: Any) -> Any:
    """Return JSON's value with the last name only of each absolute path in its texts."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    return _ABSOLUTE.sub(r"…/\1", value) if isinstance(value, str) else value


def _summary(manifest: dict[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    """Return the few lines that answer first: what was trained on what, how long, with what loss."""
    recipe, results = manifest.get("recipe", {}), manifest.get("results", {})
    base, data = manifest.get("base", {}), manifest.get("data", {}).get("train", {})
    rows = [("base", base.get("id") or recipe.get("base", {}).get("model", "?"))]
    if "adapter" in recipe:
        rows.append(("LoRA", lora_line(recipe)))
    if trained := manifest.get("trained"):
        rows.append(("trained parameters", f"{sum(group['parameters'] for group in trained.values()):,}"))
    if total := data.get("total"):
        rows.append(("data", f"{total['kept']:,} rows in {counted(len(data.get('languages', {})), 'language')}"))
    rows.append(("objective", recipe.get("objective", "sft")))
    rows.append(("steps", f"{results.get('steps', 0):,}, {results.get('tokens', 0):,} tokens"))
    for key, name in (("loss", "training loss"), ("eval_loss", "validation loss")):
        if ends := first_and_last(metrics, key):
            rows.append((name, f"{_number(ends[0])} at first, {_number(ends[1])} at the end"))
    if seconds := manifest.get("timings", {}).get("train_s"):
        rows.append(("time", duration(seconds)))
    return rows


def _stages(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the runs that led to the adapter, where there was more than this one."""
    stages = manifest.get("stages", [])
    return {"header": STAGE_HEADER, "rows": stage_rows(stages)} if len(stages) > 1 else None


def _languages(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows, tokens and share of each language, the largest first."""
    counts = manifest.get("data", {}).get("train", {}).get("languages", {})
    everything = sum(count["trained_tokens"] for count in counts.values()) or 1
    losses = manifest.get("results", {}).get(BY_LANGUAGE, {})
    rows = [
        {
            "code": code,
            "rows": count["kept"],
            "dropped": count.get("dropped", 0),
            "tokens": count["trained_tokens"],
            "share": count["trained_tokens"] / everything,
            "loss": losses.get(code),
        }
        for code, count in counts.items()
    ]
    return sorted(rows, key=lambda row: (-row["tokens"], row["code"]))


def _charts(manifest: dict[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    """Return a heading and a chart for whatever the metrics have something for."""
    unit = "nats per learned token" if manifest.get("recipe", {}).get("objective", "sft") == "sft" else "loss"
    losses = {"training": _points(metrics, "loss"), "validation": _points(metrics, "eval_loss")}
    rewards = {key.partition("/")[2]: _points(metrics, key) for key in ("rewards/chosen", "rewards/rejected")}
    return [
        ("Loss", line_chart(losses, unit)),
        ("Learning rate", line_chart({"learning rate": _points(metrics, "learning_rate")}, "per step")),
        ("Rewards", line_chart(rewards, "mean of a batch")),
        ("Validation loss by language", line_chart(_by(metrics, BY_LANGUAGE), unit)),
        ("Load entropy by layer", line_chart(_by(metrics, ENTROPY), "1 where all experts get as many tokens")),
        ("Largest share by layer", line_chart(_by(metrics, SHARE), "share of tokens of one expert")),
        ("Experts without tokens by layer", line_chart(_by(metrics, DEAD), "experts")),
        (
            "Choices of experts that changed",
            line_chart({"probe text": _points(metrics, FLIP_RATE)}, "share of choices"),
        ),
        ("Speed", line_chart({"tokens per second": _points(metrics, "tokens_per_s")}, "tokens per second")),
    ]


def _points(metrics: Metrics, key: str, inner: str | None = None) -> Points:
    found = [(line["step"], line[key] if inner is None else line[key].get(inner)) for line in metrics if key in line]
    return [(step, value) for step, value in found if value is not None]


def _by(metrics: Metrics, key: str) -> dict[str, Points]:
    """Return a line for each language or layer; of many languages those whose value rose most."""
    lines = [line[key] for line in metrics if key in line]
    names = list(dict.fromkeys(name for line in lines for name in line))
    if key == BY_LANGUAGE and len(names) > _LANGUAGES_DRAWN:
        rise = {name: (lines[-1].get(name) or 0) - (lines[0].get(name) or 0) for name in names}
        names = sorted(names, key=lambda name: -rise[name])[:_LANGUAGES_DRAWN]
    return {name if key == BY_LANGUAGE else f"layer {name}": _points(metrics, key, name) for name in names}


def _guards(manifest: dict[str, Any], metrics: Metrics) -> dict[str, Any]:
    """Return what the guards said, and what they did."""
    results = manifest.get("results", {})
    facts = [("steps skipped, because a number was not finite", f"{results.get('skipped_steps', 0):,}")]
    if "best_step" in results:
        facts.append(("the adapter is that of step", f"{results['best_step']:,}, the best evaluation"))
    return {"facts": facts, "warnings": [line for line in metrics if "warning" in line]}


def _code(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    code = manifest.get("code")
    return [("commit", code["commit"][:12] + (", with changes" if code["dirty"] else ""))] if code else []


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return names and values; nested names are joined with a comma, and what is unknown is left out."""
    pairs = list[tuple[str, str]]()
    for key, value in figures.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            pairs += _flat(value, f"{name}, ")
        elif value is not None and not isinstance(value, list):
            pairs.append((name, _number(value)))
    return pairs


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _yaml(recipe: dict[str, Any]) -> str:
    stream, yaml = io.StringIO(), YAML()
    yaml.default_flow_style = False
    yaml.dump({key: value for key, value in recipe.items() if value is not None}, stream)
    return stream.getvalue()
