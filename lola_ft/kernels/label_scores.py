"""Log-probability of each labelled token, with gradient, also where rows of the output head are trained.

The logits of a whole batch never exist. They are computed a chunk at a time in forward, and again in backward.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary, N labelled positions, C positions of a chunk, K trained
rows of the head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lola_ft.kernels.loss import IGNORE, TokenRows, logits_of

_CHUNK_ROWS = 256  # like the loss: 102 MB of float32 logits for a vocabulary of 100,000


class LabelScores(NamedTuple):
    """Scores of each position's label, all (B, S - 1); 0 or False where there is no label.

    Attributes:
        log_probs_BS: Log-probability of the label, float32, with gradient.
        entropy_BS: Entropy of the predicted distribution in nats, float32.
        mean_logits_BS: Mean logit over the vocabulary, float32.
        is_top1_BS: True where the label is the likeliest token.
        mask_BS: True where the position has a label.
    """

    log_probs_BS: Tensor
    entropy_BS: Tensor
    mean_logits_BS: Tensor
    is_top1_BS: Tensor
    mask_BS: Tensor


@torch.compiler.disable  # the number of labelled positions depends on the data
def label_scores(x_BSD: Tensor, head_VD: Tensor, labels_BS: Tensor, trained: TokenRows | None = None) -> LabelScores:
    """Score the labelled positions.

    Args:
        x_BSD: Hidden states (B, S, D) that `head_VD` projects.
        head_VD: The output head, which is frozen.
        labels_BS: Labels (B, S), not yet shifted; -100 is ignored.
        trained: Trained rows that replace some rows of the head.
    """
    targets_BS = labels_BS[:, 1:]
    mask_BS = targets_BS != IGNORE
    ids_K, rows_KD = trained or (None, None)
    scores = _LabelScores.apply(x_BSD[:, :-1][mask_BS], head_VD, targets_BS[mask_BS], ids_K, rows_KD)
    log_probs, entropy, mean_logits, is_top1 = (
        one.new_zeros(mask_BS.shape).masked_scatter(mask_BS, one) for one in scores
    )
    return LabelScores(log_probs, entropy, mean_logits, is_top1, mask_BS)


class _LabelScores(torch.autograd.Function):
    """The scores (N,) of rows; only the log-probabilities have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor, ids_K: Tensor | None, trained_KD: Tensor | None
    ) -> tuple[Tensor, ...]:
        log_probs_N, entropy_N, mean_logits_N = (
            rows_ND.new_empty(targets_N.shape, dtype=torch.float32) for _ in range(3)
        )
        is_top1_N = torch.empty_like(targets_N, dtype=torch.bool)
        trained = None if ids_K is None or trained_KD is None else TokenRows(ids_K, trained_KD)
        for start in range(0, targets_N.numel(), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            logits_CV = logits_of(rows_ND[chunk], head_VD, trained)
            mean_logits_N[chunk] = logits_CV.mean(dim=-1)
            is_top1_N[chunk] = logits_CV.argmax(dim=-1) == targets_N[chunk]
            log_probs_CV = logits_CV.log_softmax(dim=-1)
            del logits_CV  # large: at most two such tensors exist at a time
            log_probs_N[chunk] = log_probs_CV.gather(-1, targets_N[chunk, None])[:, 0]
            entropy_N[chunk] = -log_probs_CV.exp().mul_(log_probs_CV).sum(dim=-1)
        ctx.save_for_backward(rows_ND, head_VD, targets_N, ids_K, trained_KD)
        ctx.mark_non_differentiable(entropy_N, mean_logits_N, is_top1_N)
        return log_probs_N, entropy_N, mean_logits_N, is_top1_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, head_VD, targets_N, ids_K, trained_KD = ctx.saved_tensors
        d_log_probs_N = grads[0]
        trained = None if trained_KD is None else TokenRows(ids_K, trained_KD)
        d_rows_ND = torch.empty_like(rows_ND)
        d_trained_KD = None if trained_KD is None else torch.zeros_like(trained_KD, dtype=torch.float32)
        for start in range(0, targets_N.numel(), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            rows_CD, d_C = rows_ND[chunk].to(head_VD.dtype), d_log_probs_N[chunk]
            # d log p(target) / d logits = one-hot(target) - p
            d_logits_CV = logits_of(rows_CD, head_VD, trained).softmax(dim=-1).neg_()
            d_logits_CV[torch.arange(len(d_C), device=d_C.device), targets_N[chunk]] += 1
            d_logits_CV = d_logits_CV.mul_(d_C[:, None]).to(head_VD.dtype)
            if trained_KD is not None:
                d_own_CK = d_logits_CV[:, ids_K]
                d_logits_CV[:, ids_K] = 0  # replaced rows of the frozen head took no part
                d_trained_KD += (d_own_CK.t() @ rows_CD).float()
            d_x_CD = d_logits_CV @ head_VD
            if trained_KD is not None:
                d_x_CD += d_own_CK @ trained_KD.to(head_VD.dtype)
            d_rows_ND[chunk] = d_x_CD.to(d_rows_ND.dtype)
        return d_rows_ND, None, None, None, None if d_trained_KD is None else d_trained_KD.to(trained_KD.dtype)
