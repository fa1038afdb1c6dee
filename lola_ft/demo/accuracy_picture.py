"""The demo's picture: the accuracy of each language, on a map and by language family."""

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lola_ft.demo.accuracy_tables import OTHERS, family_of
from lola_ft.evaluation import ExactMatch
from lola_ft.files import write_bytes
from lola_ft.nano.declaration import Declaration
from lola_ft.routing.language_families import find_language

COLOURS = mpl.colormaps["RdYlBu"]
PER_LINE = 18  # tiles
SPLIT_FROM, NAMED_FROM = 40, 2
"""Fewest texts of a family that is split into branches, and fewest texts of a group with a line of its own."""
_FONT, _DPI = 8, 110


def draw_accuracy(result: ExactMatch, declarations: Mapping[str, Declaration], path: Path) -> Path:
    """Write a PNG: a map with a dot at each language's place, and below it one tile per text, by family.

    Red is wrong and blue is right. A tile shows the tag of its text.
    """
    groups = groups_of(result)
    lines = sum(_lines(tags) for tags in groups.values())
    figure = Figure(figsize=(10, 5 + 0.21 * lines), layout="constrained")
    world, tiles = figure.subplots(2, height_ratios=(4.3, 0.21 * lines + 0.3))
    _draw_map(world, result, declarations)
    _draw_tiles(tiles, result, groups)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), COLOURS)
    bar = figure.colorbar(scale, ax=world, shrink=0.8, pad=0.01, format=mpl.ticker.PercentFormatter(1))
    bar.set_label("right answers", fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=_DPI)
    write_bytes(path, picture.getvalue())
    return path


def groups_of(result: ExactMatch) -> dict[str, list[str]]:
    """Group the tags by family (a large family by branch), largest first; tags by decreasing accuracy."""
    known = {tag: find_language(tag) for tag in result.asked}
    families = {tag: family_of(tag) for tag in known}
    large = {family for family in families.values() if list(families.values()).count(family) >= SPLIT_FROM}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for tag in sorted(result.asked, key=lambda tag: (-result.accuracy_of(tag), tag)):
        language = known[tag]
        name = language.branch if language and families[tag] in large else families[tag]
        groups[name].append(tag)
    single = [tag for tags in groups.values() if len(tags) < NAMED_FROM for tag in tags]
    ranked = sorted((item for item in groups.items() if len(item[1]) >= NAMED_FROM), key=lambda item: -len(item[1]))
    others = sorted(single, key=lambda tag: (-result.accuracy_of(tag), tag))
    return dict(ranked) | ({OTHERS: others} if others else {})


def _draw_map(axes: Any, result: ExactMatch, declarations: Mapping[str, Declaration]) -> None:
    """Draw the map; the weakest languages last, so that no other dot hides them."""
    tags = sorted(result.asked, key=lambda tag: (-result.accuracy_of(tag), tag))
    shares = [result.accuracy_of(tag) for tag in tags]
    longitudes = [declarations[tag].longitude for tag in tags]
    latitudes = [declarations[tag].latitude for tag in tags]
    look: dict[str, Any] = {"cmap": COLOURS, "vmin": 0, "vmax": 1, "s": 36, "edgecolors": "#444444", "linewidths": 0.5}
    axes.scatter(longitudes, latitudes, c=shares, **look)
    axes.set(xlim=(-180, 180), ylim=(-50, 78), aspect=1.2, xticks=range(-180, 181, 60), yticks=range(-30, 61, 30))
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.grid(visible=True, alpha=0.3)
    axes.tick_params(labelsize=_FONT)
    axes.set_xlabel("longitude, degrees", fontsize=_FONT)
    axes.set_ylabel("latitude, degrees", fontsize=_FONT)
    asked = f"{len(tags)} texts, {result.asked.total():,} questions, {result.accuracy:.1%} right"
    axes.set_title(f"Accuracy of naming a sentence's language: {asked}", fontsize=_FONT + 2, loc="left")


def _draw_tiles(axes: Any, result: ExactMatch, groups: Mapping[str, list[str]]) -> None:
    """Draw each group on one or more lines, named with its number of texts and its accuracy."""
    line, places, names = 0, [], []
    for name, tags in groups.items():
        places.append(line)
        names.append(f"{name} ({len(tags)}) {result.accuracy_of(*tags):.0%}")
        for number, tag in enumerate(tags):
            column, share = number % PER_LINE, result.accuracy_of(tag)
            tile = Rectangle(
                (column, line + number // PER_LINE - 0.5), 1, 1, facecolor=COLOURS(share), edgecolor="white"
            )
            axes.add_patch(tile)
            colour = "white" if share < 0.15 or share > 0.85 else "black"
            place = (column + 0.5, line + number // PER_LINE)
            axes.text(*place, tag, ha="center", va="center", fontsize=_FONT - 1.5, color=colour)
        line += _lines(tags)
    axes.set(xlim=(0, PER_LINE), ylim=(line - 0.5, -0.5), xticks=[])
    axes.set_yticks(places, names, fontsize=_FONT)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "By language family, Indo-European by branch: (texts) and share of right answers",
        fontsize=_FONT + 2,
        loc="left",
    )


def _lines(tags: list[str]) -> int:
    return -(-len(tags) // PER_LINE)
