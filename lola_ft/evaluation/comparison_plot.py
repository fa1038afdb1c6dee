"""The comparison as a picture: a dot with its interval for each model and language."""

from pathlib import Path
from typing import Any

import numpy as np

from lola_ft.evaluation.comparison import Comparison


def plot(comparison: Comparison, path: Path) -> None:
    """Draw every measure in a panel of its own, languages from top to bottom."""
    plt = pyplot()
    measures = list(comparison.measures.items())
    languages = list(comparison.lines[measures[0][0]])
    height = 1.8 + 0.28 * len(languages) * max(1, 0.5 * len(comparison.models))
    figure, panels = plt.subplots(
        1, len(measures), figsize=(4.2 * len(measures) + 1, height), layout="constrained", squeeze=False, sharey=True
    )
    rows = np.arange(len(languages))
    shifts = (np.arange(len(comparison.models)) - (len(comparison.models) - 1) / 2) * 0.7 / len(comparison.models)
    for axes, (name, measure) in zip(panels[0], measures, strict=True):
        scale = 100 if measure.percent else 1
        for place, (model, shift) in enumerate(zip(comparison.models, shifts, strict=True)):
            found = [line.values[place] for line in comparison.lines[name].values()]
            values, low, high = (
                scale * np.array([getattr(one, key) for one in found]) for key in ("value", "low", "high")
            )
            errors = np.nan_to_num(np.clip([values - low, high - values], 0, None))
            axes.errorbar(values, rows + shift, xerr=errors, fmt="o", markersize=4, capsize=2, label=model)
        axes.set_xlabel(f"{measure.title}{' (%)' if measure.percent else ''}")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(rows, languages)
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib without a window."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
