"""The numbers of a report as plain values, for JSON."""

from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from lola_ft.routing.drift import Drift
from lola_ft.routing.measures import dead_experts, largest_share, load_entropy
from lola_ft.routing.profile import Profile

ROUNDING = (
    "One model was read in 4 bit and the other was not, so the changes include rounding. Profile both with "
    "--quantization nf4 (or none)."
)
_DIGITS = 6


def summarise(profile: Profile) -> dict[str, Any]:
    """Return the numbers of one profile, by language and by layer.

    An expert's specificity is its highest share over the languages, as LOLA's authors define it (arXiv 2409.11272).
    The load of a layer is the mean of the languages' shares, so that each language counts the same.
    """
    shares_LME = profile.shares
    specificity_ME, by_language_ME = shares_LME.max(dim=0)
    load_ME = shares_LME.mean(dim=0)
    entropy_LM, largest_LM = load_entropy(profile.counts_LME), largest_share(profile.counts_LME)
    dead_ME = dead_experts(profile.counts_LME.sum(dim=0))
    return {
        "profile": asdict(profile.about),
        "num_experts": profile.num_experts,
        "layers": [
            {
                "layer": layer,
                "load": rounded(load_ME[m]),
                "load_entropy": rounded(load_entropy(load_ME[m])),
                "dead_experts": dead_ME[m].nonzero().flatten().tolist(),
                "specificity": rounded(specificity_ME[m]),
                "most_specific_to": [profile.languages[place] for place in by_language_ME[m].tolist()],
            }
            for m, layer in enumerate(profile.about.layers)
        ],
        "languages": {
            language: {
                "documents": int(profile.documents_L[place]),
                "tokens": int(profile.tokens_L[place]),
                "bytes": int(profile.bytes_L[place]),
                "load_entropy": rounded(entropy_LM[place]),
                "largest_share": rounded(largest_LM[place]),
                "dead_experts": dead_experts(profile.counts_LME[place]).sum(dim=-1).tolist(),
                "shares": rounded(shares_LME[place]),
            }
            for place, language in enumerate(profile.languages)
        },
    }


def summarise_drift(drift: Drift) -> dict[str, Any]:
    """Return the changes by language; flips are None if the texts differ.

    `also_rounding` is true if one model was read in 4 bit and the other was not.
    """
    return {
        "left_out": list(drift.left_out),
        "also_rounding": len(set(drift.quantizations)) > 1,
        "languages": {
            language: {
                "jensen_shannon": rounded(drift.divergence_LM[place]),
                "flip_rate": None if (flips := drift.flips[language]) is None else rounded(flips),
            }
            for place, language in enumerate(drift.languages)
        },
    }


def describe_drift(drift: dict[str, Any]) -> list[str]:
    """Return lines with the means over languages and layers."""
    changes = drift["languages"].values()
    flips = [fmean(change["flip_rate"]) for change in changes if change["flip_rate"] is not None]
    divergence = fmean(fmean(change["jensen_shannon"]) for change in changes)
    line = f"  between the two: Jensen-Shannon divergence {divergence:.4f} bits; "
    if flips:
        line += f"{fmean(flips):.1%} of sampled tokens changed expert ({len(flips)} of {len(changes)} languages)"
    else:
        line += "changes of single tokens cannot be counted, because the texts differ"
    return [line, f"  {ROUNDING}"] if drift["also_rounding"] else [line]


def rounded(values: torch.Tensor) -> Any:
    """Return values as nested lists, rounded to six digits after the point."""
    return values.double().round(decimals=_DIGITS).tolist()
