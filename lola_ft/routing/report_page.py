"""A report on one profile, or on two and the changes between them: a page, its figures, and all numbers as JSON."""

import base64
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lola_ft.console import counted, shown_progress
from lola_ft.errors import UserError
from lola_ft.files import check_folder_target, replace_folder
from lola_ft.routing import figures
from lola_ft.routing.descent import ALL_LAYERS, MIN_LANGUAGES, describe_descent, follow_descent, routing_distances
from lola_ft.routing.drift import Drift, compare
from lola_ft.routing.language_families import describe, find_language, not_in_table, unknown_languages
from lola_ft.routing.profile import Profile
from lola_ft.routing.summary import ROUNDING, describe_drift, summarise, summarise_drift

PAGE, NUMBERS = "report.html", "report.json"


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG file, with its title on the page."""

    name: str
    title: str
    data: bytes

    @property
    def embedded(self) -> str:
        """The figure as a data URL, for a page that needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class Report:
    """The page's path, and the numbers as in `report.json`."""

    page: Path
    numbers: dict[str, Any]

    def headlines(self) -> list[str]:
        """Return the most important numbers as lines, for the terminal."""
        lines = []
        for one in filter(None, (self.numbers["first"], self.numbers["second"])):
            entropies = [layer["load_entropy"] for layer in one["layers"]]
            dead = sum(len(layer["dead_experts"]) for layer in one["layers"])
            lines.append(
                f"{one['profile']['model']}: {len(one['languages'])} languages; entropy of the load "
                f"{min(entropies):.3f} to {max(entropies):.3f}; {dead} dead experts"
            )
            if unknown := unknown_languages(list(one["languages"])):
                lines.append(f"  {not_in_table(unknown)}")
            lines += describe_descent(one["descent"]) if one["descent"] else []
        return lines + (describe_drift(self.numbers["drift"]) if self.numbers["drift"] else [])


def write_report(
    first: Profile, out: str | Path, second: Profile | None = None, permutations: int = 999, seed: int = 0
) -> Report:
    """Write a report into a folder; an earlier report there is replaced.

    Args:
        second: A profile to compare with the first, such as a fine-tuned model's with its base's.
        permutations, seed: Number of permutations and random seed of the tests of descent.

    Raises:
        UserError: The profiles cannot be compared, the folder holds something else, or scipy is missing.
    """
    folder = Path(out)
    if importlib.util.find_spec("scipy") is None:
        raise UserError("a routing report needs scipy: pip install 'lola-ft[routing]'.")
    if folder.exists() and not (folder / NUMBERS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds no report. Choose another folder.")
    check_folder_target(folder)
    drift = compare(first, second) if second else None
    numbers: dict[str, Any] = {
        "first": summarise(first) | {"descent": follow_descent(first, permutations, seed)},
        "second": summarise(second) | {"descent": follow_descent(second, permutations, seed)} if second else None,
        "drift": summarise_drift(drift) if drift else None,
    }
    drawn = chain(_pictures(first), _drift_pictures(drift) if drift else [])
    pictures = list[Picture]()
    with shown_progress("Drawing", len(first.about.layers) + 3 + 2 * (drift is not None), "pictures") as advance:
        for picture in drawn:
            pictures.append(picture)
            advance(1)
    with replace_folder(folder) as partial:
        for picture in pictures:
            (partial / f"{picture.name}.png").write_bytes(picture.data)
        text = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (partial / NUMBERS).write_text(text, encoding="utf-8")
        (partial / PAGE).write_text(_page(numbers, pictures), encoding="utf-8")
    return Report(folder / PAGE, numbers)


def _pictures(profile: Profile) -> Iterator[Picture]:
    """Draw the figures of one profile; languages are in the tree's order, so that similar ones are neighbours."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    languages, shares_LME = profile.languages, profile.shares.numpy()
    order = list(range(len(languages)))
    if len(languages) > 2:
        distances = squareform(routing_distances(profile).mean(dim=0).numpy(), checks=False)
        linkage = hierarchy.linkage(distances, "average", optimal_ordering=True)
        order = hierarchy.leaves_list(linkage).tolist()[::-1]
        yield Picture("tree", "Languages by their routing", figures.dendrogram(linkage, languages))
        flat_LF = shares_LME.reshape(len(languages), -1)
        yield Picture("map", "Languages on a plane (PCA)", figures.language_map(flat_LF, languages))
    specificity = figures.specificity(shares_LME.max(axis=0), profile.about.layers)
    yield Picture("specificity", "Specificity of each expert", specificity)
    ordered = [languages[place] for place in order]
    experts = [str(e) for e in range(profile.num_experts)]
    for m, layer in enumerate(profile.about.layers):
        title = f"layer {layer}: share of a language's tokens (even load: {1 / profile.num_experts:.3g})"
        values_LE = shares_LME[order, m]
        data = figures.heatmap(values_LE, ordered, experts, title, "expert", float(shares_LME.max()))
        yield Picture(f"layer-{layer:02}", f"Layer {layer}", data)


def _drift_pictures(drift: Drift) -> Iterator[Picture]:
    """Draw the changes, with the languages that changed most on top."""
    order = drift.divergence_LM.mean(dim=-1).argsort(descending=True, stable=True)
    languages = [drift.languages[place] for place in order.tolist()]
    values_LM = drift.divergence_LM[order].numpy()
    columns = [str(layer) for layer in drift.layers]
    top = max(float(values_LM.max()), 1e-6)
    data = figures.heatmap(values_LM, languages, columns, "Jensen-Shannon divergence, bits", "layer", top)
    yield Picture("drift", "Changes of shares", data)
    flips = {language: drift.flips[language] for language in languages}
    exact = {language: rates.numpy() for language, rates in flips.items() if rates is not None}
    if exact:
        values = np.stack(list(exact.values()))
        title = "share of sampled tokens that go to another expert"
        data = figures.heatmap(values, list(exact), columns, title, "layer", max(float(values.max()), 1e-6))
        yield Picture("flips", "Changes of single tokens", data)


def _page(numbers: dict[str, Any], pictures: list[Picture]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "counted": counted,
        "mean": lambda values: sum(values) / len(values),
        "number": _number,
        "name": describe,
        "known": find_language,
        "unknown": unknown_languages,
        "not_in_table": not_in_table,
    }
    template = environment.get_template("report.html.jinja")
    return template.render(
        **numbers, pictures=pictures, all_layers=ALL_LAYERS, min_languages=MIN_LANGUAGES, rounding=ROUNDING
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
