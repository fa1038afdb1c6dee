"""The choice of experts for some languages: per layer, the smallest set that receives most of their tokens.

Follows Expert-Specialised Fine-Tuning (arXiv 2407.01906), at top-1. Shapes: M MoE layers, E experts.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from lola_ft.errors import UserError
from lola_ft.files import check_file_target, write_text
from lola_ft.routing.profile import Profile
from lola_ft.routing.summary import rounded

CRITERIA = ("tokens", "gate")


@dataclass(frozen=True)
class Choice:
    """Experts to train, and the tokens that they receive.

    Attributes:
        experts: Expert numbers per MoE layer, as `adapter.experts.select` reads.
        reached: Share of each chosen language's tokens that goes through these experts, by layer.
        spill_over: The same share of every other language, which training these experts may affect.
        parameters, bytes: Size of the experts' adapter tensors at `rank`, in float32.
    """

    experts: list[list[int]]
    languages: list[str]
    coverage: float
    by: str
    random_seed: int | None
    reached: dict[str, list[float]]
    spill_over: dict[str, list[float]]
    rank: int
    parameters: int
    bytes: int
    base_fingerprint: str


def select_experts(
    profile: Profile,
    languages: Sequence[str],
    coverage: float,
    by: str = "tokens",
    seed: int | None = None,
    rank: int = 8,
) -> Choice:
    """Choose the fewest experts per layer that reach a coverage, the busiest first.

    Args:
        coverage: Share, above 0 and at most 1, of all tokens of the languages together, weighted by `by`.
        by: `tokens` counts an expert's tokens; `gate` sums their router probabilities, by which
            LOLA scales the expert's output.
        seed: Choose the same number of experts per layer at random instead, as a control.
        rank: LoRA rank of the predicted size.

    Raises:
        UserError: The profile lacks a language, or the coverage is out of range.
    """
    languages = list(dict.fromkeys(languages))
    if not 0 < coverage <= 1:
        raise UserError(f"--coverage {coverage}: must be above 0 and at most 1.")
    if not languages:
        raise UserError("--languages: is empty. Give codes such as sw,rw.")
    if by not in CRITERIA:
        raise UserError(f"--by {by}: is unknown; choose one of {', '.join(CRITERIA)}.")
    wanted = profile.of(languages)
    weights_LME = profile.counts_LME if by == "tokens" else profile.mean_gates_LME * profile.tokens_L[:, None, None]
    experts = [_fewest(weights_E, coverage) for weights_E in weights_LME[wanted].sum(dim=0)]
    if seed is not None:
        generator = random.Random(seed)
        experts = [sorted(generator.sample(range(profile.num_experts), len(ids))) for ids in experts]
    through_LM = _share_through(profile, experts)
    through = {language: rounded(through_LM[place]) for place, language in enumerate(profile.languages)}
    parameters = sum(map(len, experts)) * parameters_of_expert(profile, rank)
    return Choice(
        experts=experts,
        languages=languages,
        coverage=coverage,
        by=by,
        random_seed=seed,
        reached={language: through[language] for language in languages},
        spill_over={language: share for language, share in through.items() if language not in languages},
        rank=rank,
        parameters=parameters,
        bytes=4 * parameters,
        base_fingerprint=profile.about.base_fingerprint,
    )


def parameters_of_expert(profile: Profile, rank: int) -> int:
    """Return the LoRA parameters per expert: A (rank, in) and B (out, rank) of both its projections."""
    return 2 * rank * (profile.about.hidden_size + profile.about.inner_size)


def save_choice(choice: Choice, path: str | Path) -> Path:
    """Write a choice as JSON, for a recipe's `adapter.experts.select`."""
    check_file_target(path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'  "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in asdict(choice).items()]
    write_text(target, "{\n" + ",\n".join(lines) + "\n}\n")
    return target


def describe_choice(choice: Choice, others: int = 5) -> str:
    """Return a few lines that describe a choice for the user."""
    how = "at random" if choice.random_seed is not None else f"by {choice.by}"
    counts = [len(ids) for ids in choice.experts]
    lines = [
        f"{sum(counts)} experts in {len(counts)} layers ({how}): {', '.join(map(str, counts))}",
        f"adapter of rank {choice.rank}: {choice.parameters:,} parameters, {choice.bytes:,} bytes",
        "share of tokens that these experts receive (mean over layers):",
    ]
    spilt = sorted(choice.spill_over, key=lambda language: -fmean(choice.spill_over[language]))
    shown = {**choice.reached, **{language: choice.spill_over[language] for language in spilt[:others]}}
    for language, by_layer in shown.items():
        mark = "chosen" if language in choice.reached else "other"
        lines.append(f"  {language:10} {fmean(by_layer):6.1%}  {mark}")
    if left := spilt[others:]:
        lowest = fmean(choice.spill_over[left[-1]])
        lines.append(f"  and {len(left)} other languages, the lowest with {lowest:.1%} ({left[-1]})")
    return "\n".join(lines)


def _fewest(weights_E: Tensor, coverage: float) -> list[int]:
    """Return the fewest experts whose weights sum to the share, largest first; equal ones by number."""
    sizes, ids = weights_E.double().sort(descending=True, stable=True)
    sums = sizes.cumsum(dim=0).tolist()
    # Exact fractions of the number as the user wrote it: 0.7 of 10 tokens are 7, not 7.000000000000001.
    needed = Fraction(str(coverage)) * Fraction(sums[-1])
    count = next(place for place, reached in enumerate(sums, start=1) if reached >= needed)
    return sorted(ids[:count].tolist())


def _share_through(profile: Profile, experts: list[list[int]]) -> Tensor:
    """Return the share of each language's tokens that goes through the experts (L, M)."""
    chosen_ME = torch.zeros(len(experts), profile.num_experts, dtype=torch.float64)
    for layer, ids in enumerate(experts):
        chosen_ME[layer, ids] = 1
    return (profile.shares * chosen_ME).sum(dim=-1)
