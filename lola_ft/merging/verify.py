"""Comparison of a merged checkpoint's outputs with those of base plus adapter, on real sentences.

Shape suffixes: S tokens of a prompt, V vocabulary, N = S*L scores of L routers, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_ft.errors import AdapterError
from lola_ft.merging.outputs import Outputs

# Largest allowed difference of logits, as a share of the largest logit. Rounding every merged weight to 16 bits changes
# logits by one or two per cent. In float32 only the order of sums differs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Verification:
    """The comparison of the merged model with base plus adapter, on the tokens of the prompts.

    Attributes:
        max_logit_difference: Largest absolute difference over the vocabulary at the `compared` positions.
        largest_logit: Largest absolute logit, as the scale of the difference.
        top1_agreement: Share of positions with the same most likely next token.
        tokens: Number of tokens of the prompts.
        compared: Number of tokens before the first one in their prompt that rounding sent to another expert. From there
            on, logits differ by more than rounding.
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
        reference: Outputs of base plus adapter, by prompt.
        result: Outputs of the merged model, by prompt.
        weights_dtype: Dtype of the merged weights.

    Raises:
        AdapterError: If they differ by more than rounding explains.
    """
    logits, merged_logits, scores, merged_scores = _comparable(reference, result)
    for what, a, b in (("router scores", scores, merged_scores), ("logits", logits, merged_logits)):
        difference, largest = (a - b).abs().max().item(), a.abs().max().item()
        if not difference <= TOLERANCE[weights_dtype] * largest:  # NaN fails, too
            raise AdapterError(
                f"The merged model's {what} differ from base plus adapter by {difference:.3g} (largest {largest:.3g}), "
                f"more than {weights_dtype} rounding explains. Nothing was written."
            )
    agree = torch.cat(
        [a.logits_SV.argmax(-1) == b.logits_SV.argmax(-1) for a, b in zip(reference, result, strict=True)]
    )
    return Verification(difference, largest, agree.float().mean().item(), agree.numel(), len(logits), result[0].dtype)


def _comparable(reference: list[Outputs], result: list[Outputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits and router scores of both models that may differ only by rounding.

    If two experts have almost equal scores, rounding may change the choice. The token then goes through another expert,
    and all later tokens see the difference. So scores up to and including the first such token, and logits before it,
    must still agree.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for a, b in zip(reference, result, strict=True):
        # N scores are ordered by token, then by layer, so score n belongs to token n // L, with L = N / S.
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
