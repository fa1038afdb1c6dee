"""The figures of a report, as PNG files in memory. Each is readable with 3 languages and with 150.

Shapes: L languages, M MoE layers, E experts.
"""

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lola_ft.routing.language_families import describe, find_language

_ROW, _FONT, _DPI = 0.155, 7, 110  # inches per language, points, dots per inch
_OTHER = "#777777"


def family_colours(languages: Sequence[str]) -> dict[str, str]:
    """Return a colour per family with two or more languages, the largest first; other families stay grey."""
    found = Counter(language.family for code in languages if (language := find_language(code)) and language.family)
    families = [family for family, count in sorted(found.items(), key=lambda item: (-item[1], item[0])) if count > 1]
    # The strong colours of tab20 first: its neighbouring colours are two tones of one colour.
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    order.remove(14)  # grey
    order.remove(15)
    palette = mpl.colormaps["tab20"]
    return {family: mpl.colors.to_hex(palette(order[i])) for i, family in enumerate(families[: len(order)])}


def colour_of(language: str, colours: dict[str, str]) -> str:
    found = find_language(language)
    return colours.get(found.family, _OTHER) if found else _OTHER


def heatmap(
    values: np.ndarray, languages: Sequence[str], columns: Sequence[str], title: str, below: str, top: float
) -> bytes:
    """Draw languages by columns (experts or layers), darker for larger values; codes in their family's colour.

    Args:
        below: The label of the columns.
        top: The value of the darkest colour, so that several figures share a scale.
    """
    rows, count = values.shape
    figure = Figure(figsize=(max(4.5, 2.6 + 0.3 * count), 1.3 + _ROW * max(rows, 6)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="magma_r", vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks(range(count), columns, fontsize=_FONT)
    axes.set_yticks(range(rows), [describe(code) for code in languages], fontsize=_FONT)
    _colour_labels(axes.get_yticklabels(), languages)
    axes.tick_params(length=0, labeltop=rows > 40)
    axes.set_xlabel(below, fontsize=_FONT + 1)
    axes.set_title(title, fontsize=_FONT + 2)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / (_ROW * max(rows, 6))), pad=0.02)
    bar.ax.tick_params(labelsize=_FONT)
    return _png(figure)


def specificity(values_ME: np.ndarray, layers: Sequence[int]) -> bytes:
    """Draw each expert's highest share over the languages, layer by layer."""
    num_layers, num_experts = values_ME.shape
    figure = Figure(figsize=(max(4.5, 2 + 0.42 * num_experts), 1.4 + 0.32 * num_layers), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values_ME, aspect="auto", cmap="magma_r", vmin=0, vmax=1)
    for m, e in np.ndindex(values_ME.shape):
        colour = "white" if values_ME[m, e] > 0.5 else "black"
        axes.text(e, m, f"{values_ME[m, e]:.2f}", ha="center", va="center", fontsize=_FONT, color=colour)
    axes.set_xticks(range(num_experts), [str(e) for e in range(num_experts)], fontsize=_FONT)
    axes.set_yticks(range(num_layers), [f"layer {layer}" for layer in layers], fontsize=_FONT)
    axes.tick_params(length=0)
    axes.set_xlabel("expert", fontsize=_FONT + 1)
    axes.set_title(f"highest share over the languages (even load: {1 / num_experts:.3g})", fontsize=_FONT + 2)
    figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=_FONT)
    return _png(figure)


def principal_components(shares_LF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the languages' first two principal components (L, 2), and their shares of the variance."""
    centred = shares_LF - shares_LF.mean(axis=0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(
        right[np.arange(len(right)), np.abs(right).argmax(axis=1)]
    )  # fixes the signs, which otherwise depend on the machine
    total = (sizes**2).sum()
    return (left * sizes * signs)[:, :2], (sizes**2 / total if total else sizes)[:2]


def language_map(shares_LF: np.ndarray, languages: Sequence[str]) -> bytes:
    """Draw the languages' first two principal components."""
    places_L2, parts = principal_components(shares_LF)
    figure = Figure(figsize=(11, 8) if len(languages) < 60 else (16, 12), layout="constrained")
    axes = figure.add_subplot()
    colours = family_colours(languages)
    for language, (x, y) in zip(languages, places_L2, strict=True):
        colour = colour_of(language, colours)
        axes.plot(x, y, "o", color=colour, markersize=3)
        axes.annotate(language, (x, y), xytext=(2, 2), textcoords="offset points", fontsize=_FONT, color=colour)
    axes.set_xlabel(f"first component ({parts[0]:.0%} of the variance)", fontsize=_FONT + 1)
    axes.set_ylabel(f"second component ({parts[1]:.0%})", fontsize=_FONT + 1)
    axes.tick_params(labelsize=_FONT)
    axes.grid(alpha=0.2)
    _legend(axes, colours, "best")
    return _png(figure)


def dendrogram(linkage: np.ndarray, languages: Sequence[str]) -> bytes:
    """Draw the tree of languages by routing; a branch with languages of one family has that family's colour."""
    from scipy.cluster import hierarchy

    count, colours = len(languages), family_colours(languages)
    node_colours = [colour_of(language, colours) for language in languages]
    for first, second, *_ in linkage:
        both = {node_colours[int(first)], node_colours[int(second)]}
        node_colours.append(both.pop() if len(both) == 1 else _OTHER)
    figure = Figure(figsize=(9, 1.2 + _ROW * max(count, 8)), layout="constrained")
    axes = figure.add_subplot()
    tree: dict[str, Any] = hierarchy.dendrogram(
        linkage,
        orientation="left",
        labels=[describe(code) for code in languages],
        leaf_font_size=_FONT,
        link_color_func=lambda node: node_colours[node],
        ax=axes,
    )
    _colour_labels(axes.get_yticklabels(), [languages[leaf] for leaf in tree["leaves"]])
    axes.set_xlabel("mean Jensen-Shannon distance (average linkage)", fontsize=_FONT + 1)
    axes.tick_params(axis="x", labelsize=_FONT)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    furthest, nearest = axes.get_xlim()
    axes.set_xlim(furthest + 0.25 * (furthest - nearest), nearest)  # room for the legend, left of the root
    _legend(axes, colours, "upper left")
    return _png(figure)


def _legend(axes: Any, colours: dict[str, str], place: str) -> None:
    if colours:
        marks = [Line2D([], [], marker="s", linestyle="", color=colour) for colour in [*colours.values(), _OTHER]]
        axes.legend(marks, [*colours, "other"], fontsize=_FONT, loc=place, framealpha=0.8)


def _colour_labels(labels: Any, languages: Sequence[str]) -> None:
    colours = family_colours(languages)
    for label, language in zip(labels, languages, strict=True):
        label.set_color(colour_of(language, colours))


def _png(figure: Figure) -> bytes:
    """Return the figure as PNG; a fixed `Software` entry makes the same numbers give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": "lola_ft"})
    return buffer.getvalue()
