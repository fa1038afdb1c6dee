"""Gate and up of gated experts: one LoRA pair in memory and in PEFT's layout, two in the layout `per_expert`.

Fused, the pair of `gate_up_proj` has one A (R, in) and one B (2F, R): gate and up share A. In `per_expert` they are two
pairs with the same A. Two pairs of rank R with different A's, as transformers 4 trained them, become one of rank 2R:

    A (2R, in)      = [A_gate; A_up]                    one below the other
    B (2F, 2R)      = [[B_gate, 0], [0, B_up]]          zeros where gate would read up's rank, and the reverse
    B @ A (2F, in)  = [B_gate @ A_gate; B_up @ A_up]    exactly the two updates
"""

import warnings
from collections import defaultdict
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.errors import AdapterError
from lola_ft.families.expert_layout import ExpertName

Stacked: TypeAlias = dict[tuple[str, int], dict[str, LoraPair]]
"""Pairs of one fused parameter, by its module and expert, then by projection on disk."""


def joined_pair(weights: AdapterWeights, expert: ExpertName) -> LoraPair:
    """Return the pair of an expert's fused parameter: its only projection's, or gate's and up's joined.

    Raises:
        AdapterError: If only one of gate and up has a pair, or their A or alpha differ; see `sharing_inputs`.
    """
    layout = weights.architecture.family.experts
    assert layout is not None, "only experts are fused"
    projections = layout.stacks[layout.stack_of(expert.projection)]
    names = [layout.name(expert.module, expert.expert, projection) for projection in projections]
    pairs = [weights.pairs.get(name) for name in names]
    first, held = pairs[0], [pair for pair in pairs if pair is not None]
    if first is None or len(held) < len(names) or not all(_share_input(first, pair) for pair in held):
        raise AdapterError(
            f"{' and '.join(names)}: they do not have the same A and alpha, which only the layout per_expert can hold."
        )
    return first if len(names) == 1 else replace(first, b=torch.cat([pair.b for pair in held]))


def sharing_inputs(weights: AdapterWeights) -> AdapterWeights:
    """Return an equal adapter in which gate and up of each expert share one A; itself if they share it already.

    Raises:
        AdapterError: If gate and up have different ranks or scalings, which this single pair cannot express.
    """
    layout = weights.architecture.family.experts
    for stack, projections in layout.stacks.items() if layout else ():
        stacked = _pairs_of(weights, stack)
        if len(projections) == 1 or not stacked or all(_is_shared(pairs, projections) for pairs in stacked.values()):
            continue
        assert layout is not None, "only experts are fused"
        changed = dict(weights.pairs)
        for module, expert in stacked:
            names = [layout.name(module, expert, projection) for projection in projections]
            changed |= dict(zip(names, _side_by_side(weights, names), strict=True))
        weights = replace(weights, pairs=changed)
        warnings.warn(
            f"{' and '.join(projections)} of the experts each had a matrix A of its own. As one pair of {stack}, their "
            "ranks are added. Nothing is lost.",
            stacklevel=3,
        )
    return weights


def _pairs_of(weights: AdapterWeights, stack: str) -> Stacked:
    found: Stacked = defaultdict(dict)
    family = weights.architecture.family
    for name, pair in weights.pairs.items():
        expert = family.parse_expert(name)
        if expert and family.experts and family.experts.stack_of(expert.projection) == stack:
            found[expert.module, expert.expert][expert.projection] = pair
    return found


def _is_shared(pairs: dict[str, LoraPair], projections: tuple[str, ...]) -> bool:
    first = next(iter(pairs.values()))
    return len(pairs) == len(projections) and all(_share_input(first, pair) for pair in pairs.values())


def _share_input(first: LoraPair, second: LoraPair) -> bool:
    return first.alpha == second.alpha and _equal(first.a, second.a)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b)))


def _side_by_side(weights: AdapterWeights, names: list[str]) -> list[LoraPair]:
    """Return pairs of one expert that all have both A's. A projection without a pair gets zeros."""
    given = [weights.pairs[name] for name in names if name in weights.pairs]
    scalings = {weights.scaling(name) for name in names if name in weights.pairs}
    if len(scalings) > 1 or len({pair.rank for pair in given}) > 1:
        raise AdapterError(
            f"{names[0]} and {names[1].rpartition('.')[2]}: their ranks or scalings differ, which one fused pair "
            "cannot express. Keep the adapter in the layout per_expert, or merge it."
        )
    # Twice the rank: alpha grows with it, so that the scaling stays the same.
    rank, total = given[0].rank, len(names) * given[0].rank
    alpha = given[0].alpha * (total / rank) ** (0.5 if weights.rslora else 1.0)
    pairs = [weights.pairs.get(name, replace(given[0], b=torch.zeros_like(given[0].b))) for name in names]
    # a (2R, in) is shared; b (F, 2R) of each projection has its own R columns, and zeros in the others.
    a = torch.cat([pair.a for pair in pairs])
    result = []
    for number, pair in enumerate(pairs):
        b = pair.b.new_zeros(pair.b.shape[0], total)
        b[:, number * rank : (number + 1) * rank] = pair.b
        result.append(LoraPair(a, b, alpha))
    return result
