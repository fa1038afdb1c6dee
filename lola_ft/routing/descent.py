"""Tests of routing against descent: distances between languages' routing, compared with family, script and tokens.

Shapes: L languages, M MoE layers, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lola_ft.console import shown_progress
from lola_ft.routing.language_families import family_distances, find_language, script_distances
from lola_ft.routing.mantel import Correlation, mantel, neighbour_agreement
from lola_ft.routing.measures import jensen_shannon
from lola_ft.routing.profile import Profile

MIN_LANGUAGES = 8
ALL_LAYERS = "all"


def routing_distances(profile: Profile) -> Tensor:
    """Return Jensen-Shannon distances between languages (M, L, L), float64: the root of the divergence of shares."""
    shares_LME = profile.shares
    rows = [jensen_shannon(one_ME[None], shares_LME).sqrt() for one_ME in shares_LME]  # a row at a time: L*L*M*E floats
    return torch.stack(rows).permute(2, 0, 1).contiguous()


def token_distances(profile: Profile) -> Tensor:
    """Return distances between token histograms (L, L), float64: 1 minus their overlap, so 1 without shared tokens."""
    shares_LV = profile.token_shares()
    return 1 - torch.stack([torch.minimum(row_V, shares_LV).sum(dim=-1) for row_V in shares_LV])


def follow_descent(profile: Profile, permutations: int = 999, seed: int = 0) -> dict[str, Any] | None:
    """Test whether related languages use the same experts more than their scripts and tokens explain.

    Returns:
        For all layers together (the mean of their distances) and for each layer: rank correlations by Mantel's test
        (`mantel`), plain and given script and tokens, and how often the nearest language has the same family or script
        (`neighbours`). None if fewer than 8 languages have a known family, or all have the same family.
    """
    found = {place: find_language(code) for place, code in enumerate(profile.languages)}
    known = {place: language for place, language in found.items() if language and language.family}
    families = [language.family for language in known.values()]
    if len(known) < MIN_LANGUAGES or len(set(families)) < 2:
        return None
    places = torch.tensor(list(known))
    by_layer = routing_distances(profile)[:, places][:, :, places]
    routing_KLL = torch.cat([by_layer.mean(dim=0, keepdim=True), by_layer])
    family = family_distances(list(known.values()))
    script = script_distances(list(known.values()))
    tokens = token_distances(profile)[places][:, places]
    tests: dict[str, tuple[Tensor, Sequence[Tensor]]] = {
        "family": (family, ()),
        "script": (script, ()),
        "tokens": (tokens, ()),
        "family given script": (family, (script,)),
        "family given tokens": (family, (tokens,)),
        "family given script and tokens": (family, (script, tokens)),
    }
    correlations = dict[str, list[Correlation]]()
    with shown_progress("Testing descent", len(tests), "tests") as advance:
        for name, test in tests.items():
            correlations[name] = mantel(routing_KLL, *test, permutations, seed)
            advance(1)
    scripts = [language.script for language in known.values()]
    names = [ALL_LAYERS, *(str(layer) for layer in profile.about.layers)]
    return {
        "languages": len(known),
        "families": len(set(families)),
        "scripts": len(set(scripts)),
        "permutations": permutations,
        "seed": seed,
        "layers": {
            name: {
                "mantel": {test: plain(asdict(results[k])) for test, results in correlations.items()},
                "neighbours": {
                    label: plain(asdict(neighbour_agreement(routing_KLL[k], labels, permutations, seed)))
                    for label, labels in (("family", families), ("script", scripts))
                },
            }
            for k, name in enumerate(names)
        },
    }


def describe_descent(found: dict[str, Any]) -> list[str]:
    """Return the tests of all layers together, one line per test."""
    tests = found["layers"][ALL_LAYERS]
    lines = [
        f"  distance of routing against distance of {name}: r {_number(test['r'])}, p {_number(test['p'])}"
        for name, test in tests["mantel"].items()
    ]
    return lines + [
        f"  the nearest language has the same {name}: {_number(near['share'])} (by chance {_number(near['chance'])}, "
        f"p {_number(near['p'])})"
        for name, near in tests["neighbours"].items()
    ]


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2g}" if 0 < value < 0.001 else f"{value:.3f}"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values for JSON, with None in place of NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
