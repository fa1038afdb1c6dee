"""The language-model loss without the logits of a whole batch.

Only rows with a label are scored, a chunk at a time. Forward also computes the gradient of the hidden states, so that a
chunk's logits can be freed when the next chunk begins; backward only scales the gradient. One chunk of C rows:

    logits   (C, V) = rows (C, D) @ head.T (D, V)
    loss           += sum of -log_softmax(logits)[targets]
    d_logits (C, V) = softmax(logits) - one_hot(targets)    in the memory of the logits
    d_rows   (C, D) = d_logits (C, V) @ head (V, D)

Shape suffixes: B batch, S sequence, D hidden, V vocabulary, N labelled rows, C rows of a chunk, K trained rows of the
head.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lola_ft.kernels.grouping import padded_rows

IGNORE = -100
# 256 rows of 100 096 float32 logits are 102 MB; larger chunks gain nothing, smaller ones lose matmul efficiency.
_CHUNK_ROWS = 256
_CPU_ROWS = 32  # rows that a CPU takes from logits to gradients at a time: few enough for the cores' caches


class TokenRows(NamedTuple):
    """Trained rows that replace some rows of an output head.

    Attributes:
        ids_K: Their token ids (K,), int64.
        rows_KD: (K, D), any float dtype.
    """

    ids_K: Tensor
    rows_KD: Tensor


def head_of(head: nn.Module) -> tuple[Tensor, TokenRows | None]:
    """Return an output head's frozen weight (V, D), and an adapter's trained rows that replace some of it, if any."""
    layer: Any = getattr(head, "token_adapter", None)
    apart = hasattr(layer, "rows")  # PEFT's own layer returns one matrix with the trained rows inserted
    weight: Any = layer.get_base_layer().weight if apart else head.weight
    return weight, layer.rows() if apart else None


@torch.compiler.disable  # the number of labelled rows depends on the data
def labelled_cross_entropy(
    x_BSD: Tensor,
    head_VD: Tensor,
    labels_BS: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    trained: TokenRows | None = None,
) -> Tensor:
    """Return the next-token cross-entropy of the labelled positions, in nats.

    Args:
        x_BSD: Hidden states (B, S, D) that `head_VD` projects.
        labels_BS: Labels (B, S), not yet shifted; -100 is ignored.
        num_items_in_batch: Divisor of the sum; by default the number of labels. With gradient accumulation the trainer
            gives the number of labels of the whole step, so that 1 micro-batch of 8 equals 8 micro-batches of 1.
        trained: Trained rows that replace some rows of the head.

    Returns:
        A float32 scalar; a differentiable 0 if nothing is labelled.
    """
    rows_ND, targets_N = labelled_rows(x_BSD, labels_BS)
    divisor = targets_N.numel() if num_items_in_batch is None else num_items_in_batch
    ids_K, rows_KD = trained or (None, None)
    total = _SummedCrossEntropy.apply(rows_ND, head_VD, targets_N, ids_K, rows_KD)
    return total / torch.as_tensor(divisor, device=total.device).clamp(min=1)


@torch.no_grad()
def label_nats(x_BSD: Tensor, head_VD: Tensor, labels_BS: Tensor, trained: TokenRows | None = None) -> Tensor:
    """Return minus the log-probability of each labelled token, in nats, without gradient.

    Args:
        x_BSD, head_VD, labels_BS, trained: As for `labelled_cross_entropy`.

    Returns:
        Float32 (N,), in the order of the labels, row by row.
    """
    rows_ND, targets_N = labelled_rows(x_BSD, labels_BS)
    nats_N = rows_ND.new_empty(targets_N.shape, dtype=torch.float32)
    padded_ND = _with_few_sizes(rows_ND)
    for start in range(0, rows_ND.shape[0], _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        targets = targets_N[chunk]
        logits = logits_of(padded_ND[chunk], head_VD, trained)[: targets.numel()]
        nats_N[chunk] = F.cross_entropy(logits, targets, reduction="none")
    return nats_N


def labelled_rows(x_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states (N, D) of positions whose next token is labelled, and their labels (N,).

    With S = 4 and the labels [[-100, -100, 7, 2]], N is 2: the states of positions 1 and 2, and the labels [7, 2].

    On a GPU the host waits here for N, which decides the shapes of all later steps. Scoring every position instead
    would cost more: the output head is a sixth of LOLA's work per token, and prompts have no labels.
    """
    targets_BS = labels_BS[:, 1:]
    mask_BS = targets_BS != IGNORE
    return x_BSD[:, :-1][mask_BS], targets_BS[mask_BS]


def logits_of(rows_CD: Tensor, head_VD: Tensor, trained: TokenRows | None = None) -> Tensor:
    """Return the float32 logits (C, V) of some rows (C, D); trained rows replace rows of the head."""
    rows_CD = rows_CD.to(head_VD.dtype)
    logits_CV = rows_CD @ head_VD.t()
    if trained is not None:
        logits_CV[:, trained.ids_K] = rows_CD @ trained.rows_KD.to(head_VD.dtype).t()
    return logits_CV.float()


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over rows. Forward computes the gradients of all inputs that want one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        ids_K: Tensor | None = None,
        trained_KD: Tensor | None = None,
    ) -> Tensor:
        wants_rows, wants_head = ctx.needs_input_grad[:2]
        d_trained_KD = None if trained_KD is None else torch.zeros_like(trained_KD, dtype=torch.float32)
        own_KD = None if trained_KD is None else trained_KD.to(head_VD.dtype)
        d_rows_ND = torch.empty_like(rows_ND) if wants_rows else None
        d_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        total = rows_ND.new_zeros((), dtype=torch.float32)
        padded_ND = _with_few_sizes(rows_ND)
        logits_CV = head_VD.new_empty(min(_CHUNK_ROWS, padded_ND.shape[0]), head_VD.shape[0])
        for start in range(0, rows_ND.shape[0], _CHUNK_ROWS):
            # logits (C, V) = rows (C, D) @ head.T (D, V), with the columns of trained tokens replaced
            chunk = slice(start, start + _CHUNK_ROWS)
            rows, targets = padded_ND[chunk].to(head_VD.dtype), targets_N[chunk]
            logits = torch.mm(rows, head_VD.t(), out=logits_CV[: rows.shape[0]])
            if own_KD is not None:
                logits[:, ids_K] = rows @ own_KD.t()
            # From here on `logits` holds d_logits (C, V), if any gradient is wanted.
            total += _nats_and_gradients(logits[: targets.numel()], targets, any(ctx.needs_input_grad))
            # d_trained (K, D) = d_logits of the trained tokens (K, C) @ rows (C, D)
            if own_KD is not None and d_trained_KD is not None:
                d_own_CK = logits[:, ids_K]
                logits[:, ids_K] = 0  # replaced rows of the frozen head took no part
                d_trained_KD += (d_own_CK.t() @ rows).float()
            # d_rows (C, D) = d_logits (C, V) @ head (V, D); d_head (V, D) = d_logits.T (V, C) @ rows (C, D)
            if d_rows_ND is not None:
                d_x = logits @ head_VD
                d_rows = d_x if own_KD is None else d_x + d_own_CK @ own_KD
                d_rows_ND[chunk] = d_rows[: targets.numel()].to(d_rows_ND.dtype)
            if d_head_VD is not None:
                d_head_VD += (logits.t() @ rows).float()
        ctx.save_for_backward(d_rows_ND, d_head_VD, d_trained_KD)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows_ND, d_head_VD, d_trained_KD = ctx.saved_tensors
        d_total = grads[0]
        d_rows = None if d_rows_ND is None else d_rows_ND * d_total.to(d_rows_ND.dtype)
        d_head = None if d_head_VD is None else (d_head_VD * d_total).to(ctx.head_dtype)
        return d_rows, d_head, None, None, None if d_trained_KD is None else d_trained_KD * d_total


def _with_few_sizes(rows_ND: Tensor) -> Tensor:
    """Return the rows (N, D) with rows of zeros at the end, so that a CPU's last chunk has one of few sizes.

    A CPU's matrix library builds and keeps a kernel for each new size (see `grouping`). Logits and gradients of a row
    of zeros have no effect: they are cut off, or multiplied with the row.
    """
    last = rows_ND.shape[0] % _CHUNK_ROWS
    missing = padded_rows(last) - last if rows_ND.device.type == "cpu" else 0
    return F.pad(rows_ND, (0, 0, 0, missing)) if missing else rows_ND


def _nats_and_gradients(logits_NV: Tensor, targets_N: Tensor, gradients: bool) -> Tensor:
    """Return the sum of minus the targets' log-probabilities, and overwrite the logits with its gradient if wanted."""
    total = logits_NV.new_zeros((), dtype=torch.float32)
    at_a_time = _CPU_ROWS if logits_NV.device.type == "cpu" else max(1, targets_N.numel())
    for logits, targets in zip(logits_NV.split(at_a_time), targets_N.split(at_a_time), strict=True):
        log_probs = logits.float().log_softmax(dim=-1)
        total += F.nll_loss(log_probs, targets, reduction="sum")
        if gradients:
            d_logits = log_probs.exp_()  # the same memory: logits are large
            d_logits[torch.arange(targets.numel(), device=targets.device), targets] -= 1
            logits.copy_(d_logits)
    return total
