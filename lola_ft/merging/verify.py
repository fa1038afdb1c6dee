"""Proof that a merged checkpoint computes what base plus adapter does, on real sentences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_ft.errors import AdapterError
from lola_ft.merging.outputs import Outputs

# Largest logit difference allowed, as a share of the largest logit. Rounding every merged weight to 16 bits moves
# logits by a per cent or two; float32 leaves only the order of summation.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Verification:
    """Comparison of merged and base-plus-adapter on `tokens` tokens of the prompts.

    Attributes:
        max_logit_difference: Largest absolute difference over the vocabulary at the `compared` positions.
        largest_logit: For scale.
        top1_agreement: Share of positions whose most likely next token is the same.
        compared: Tokens before the first of their prompt that rounding sent to another expert: from there on logits
            differ by more than rounding.
        dtype: Dtype of both computations.
    """

    max_logit_difference: float
    largest_logit: float
    top1_agreement: float
    tokens: int
    compared: int
    dtype: str


def compare(reference: list[Outputs], result: list[Outputs], weights_dtype: torch.dtype) -> Verification:
    """Compare the outputs of base plus adapter and of the merged model.

    Args:
        weights_dtype: Of the merged weights.

    Raises:
        AdapterError: If they differ by more than rounding explains.
    """
    logits, merged_logits, scores, merged_scores = _comparable(reference, result)
    for what, a, b in (("router scores", scores, merged_scores), ("logits", logits, merged_logits)):
        difference, largest = (a - b).abs().max().item(), a.abs().max().item()
        if not difference <= TOLERANCE[weights_dtype] * largest:  # false for NaN, too
            raise AdapterError(
                f"The merged model's {what} differ from base plus adapter by {difference:.3g} (largest {largest:.3g}), "
                f"more than {weights_dtype} rounding explains. Nothing was written."
            )
    agree = torch.cat(
        [a.logits_SV.argmax(-1) == b.logits_SV.argmax(-1) for a, b in zip(reference, result, strict=True)]
    )
    return Verification(difference, largest, agree.float().mean().item(), agree.numel(), len(logits), result[0].dtype)


def _comparable(reference: list[Outputs], result: list[Outputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits and router scores of both that may differ only by rounding.

    A score near a tie may fall the other way after rounding. Its token then goes through another expert, and all later
    tokens see the difference. Scores up to and with the first such token, and logits before it, must still agree.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for a, b in zip(reference, result, strict=True):
        rerouted_N = (a.choices() != b.choices()).any(-1).tolist()
        first = rerouted_N.index(True) if True in rerouted_N else len(rerouted_N)
        seq = first * len(a.logits_SV) // len(rerouted_N)
        parts.append((a.logits_SV[:seq], b.logits_SV[:seq], a.scores_NE[: first + 1], b.scores_NE[: first + 1]))
    logits, merged_logits, scores, merged_scores = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(logits) == 0:
        raise AdapterError(
            "The merged model sends the first token of every prompt to other experts than base plus adapter does. "
            "Nothing was written."
        )
    return logits, merged_logits, scores, merged_scores
