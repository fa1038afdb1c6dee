"""Plots of a run, drawn from its metrics: losses and learning rate, languages, routing."""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl

from lola_ft.files import write_bytes
from lola_ft.training.reports.metrics import BY_LANGUAGE, DEAD, ENTROPY, FLIP_RATE, SHARE

mpl.use("Agg")  # set before pyplot is imported, which would look for a screen

from matplotlib import pyplot as plt

Metrics = list[dict[str, Any]]

_LANGUAGES_NAMED = 12


def plot_run(metrics: Metrics, folder: Path, loss: str = "nats per trained token") -> list[Path]:
    """Draw the plots that the metrics have data for; returns their files."""
    drawn = [plot_loss(metrics, folder / "loss.png", loss)]
    if any(BY_LANGUAGE in line for line in metrics):
        drawn.append(plot_languages(metrics, folder / "languages.png"))
    if any(ENTROPY in line for line in metrics):
        drawn.append(plot_routing(metrics, folder / "routing.png"))
    return drawn


def plot_loss(metrics: Metrics, path: Path, unit: str = "nats per trained token") -> Path:
    """Draw training and validation loss over the steps, with the learning rate below."""
    figure, (losses, rate) = plt.subplots(2, figsize=(8, 5.5), layout="constrained", sharex=True, height_ratios=(4, 1))
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        _draw(losses, metrics, key, style, label)
    _draw(rate, metrics, "learning_rate", "-", "learning rate")
    losses.set_ylabel(f"loss ({unit})")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimiser step")
    if losses.has_data():
        losses.legend()
    return _save(figure, path)


def plot_languages(metrics: Metrics, path: Path) -> Path:
    """Draw each language's validation loss, naming the languages whose loss rose most since the first evaluation."""
    by_step = {line["step"]: line[BY_LANGUAGE] for line in metrics if BY_LANGUAGE in line}
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    codes = sorted(last, key=lambda code: (first.get(code) or 0) - (last[code] or 0))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, code in enumerate(codes):
        named = place < _LANGUAGES_NAMED
        look = {} if named else {"color": "#bbbbbb", "zorder": 1}
        _draw(axes, metrics, f"{BY_LANGUAGE}/{code}", "o-", code if named else "", **look)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("validation loss (nats per trained token)")
    axes.legend(title="largest rise first", fontsize=8)
    return _save(figure, path)


def plot_routing(metrics: Metrics, path: Path) -> Path:
    """Draw each MoE layer's load over the steps (entropy, largest share, idle experts), and the changed choices."""
    flips = any(FLIP_RATE in line for line in metrics)
    figure, panels = plt.subplots(3 + flips, figsize=(8, 8 + 2 * flips), layout="constrained", sharex=True)
    layers = list(next(line[ENTROPY] for line in metrics if ENTROPY in line))
    colours = mpl.colormaps["viridis"]
    titles = ((ENTROPY, "load entropy (1: even)"), (SHARE, "largest share"), (DEAD, "experts without tokens"))
    for axes, (key, title) in zip(panels, titles, strict=False):
        for place, layer in enumerate(layers):
            colour = colours(place / max(1, len(layers) - 1))
            _draw(axes, metrics, f"{key}/{layer}", "-", f"layer {layer}", color=colour)
        axes.set_ylabel(title)
    if panels[0].has_data():
        panels[0].legend(fontsize=7, ncols=4)
    if flips:
        _draw(panels[-1], metrics, FLIP_RATE, "o-", "")
        panels[-1].set_ylabel("choices changed")
    panels[-1].set_xlabel("optimiser step")
    return _save(figure, path)


def _draw(axes: Any, metrics: Metrics, key: str, style: str, label: str, **look: Any) -> None:
    """Draw one line; the key `a/b` means the key b in the object a."""
    outer, _, inner = key.partition("/")
    values = [(line["step"], line[outer].get(inner) if inner else line[outer]) for line in metrics if outer in line]
    points = [(step, value) for step, value in values if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label or None, markersize=4, linewidth=1.2, **look)
    axes.grid(visible=True, alpha=0.3)


def _save(figure: Any, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    write_bytes(path, picture.getvalue())
    return path
