"""Attention with a faster backward, for training in bfloat16 on a CPU with matrix units and sequences up to 512 tokens.

PyTorch's fused attention (2.13) is fast forward. Its backward does not use the matrix units, so that it takes as long
in bfloat16 as in float32: a fifth of a training step. Here forward is PyTorch's, and backward is five matrix products
for some heads at a time. They compute the whole (S, S) square, although causal attention needs only the half below the
diagonal. For long sequences this costs more than the matrix units gain. With few tokens and heads (up to 256 tokens
with two heads, 32 with twelve) PyTorch's backward is faster, too, but models that small are faster in float32 anyway.

The maths of one head, with forward's logsumexp L (S,) of each row of scores:

    scores (S, S) = scale * q (S, D) @ k.T (D, S)
    weights       = exp(scores - L)                         softmax; 0 where a query does not see a key
    delta (S,)    = d_out . out                             row by row; equals sum over keys of weights * d_weights
    d_scores      = weights * (d_out @ v.T - delta)         gradient of softmax
    d_q = scale * d_scores @ k,   d_k = scale * d_scores.T @ q,   d_v = weights.T @ d_out

The trick: `scores - L` and `d_out @ v.T - delta` are small differences of larger numbers. The products are stored in
bfloat16 (8 bits of precision), and subtracting afterwards would leave little of the result. So the subtraction happens
inside the product, whose sums are float32: q gets further columns with -L / scale, and k gets columns of ones.

    [q, -L/scale] (S, D+1) @ [k, 1].T (D+1, S) = q @ k.T - L/scale

-L / scale itself is a float32 number. It is split into three bfloat16 pieces (three columns), because 3 * 8 bits hold
float32's 24 bits.

Shape suffixes: B batch, H heads, S sequence, D head size.
"""

from typing import Any

import torch
from torch import Tensor

LONGEST = 512
"""Tokens of the longest sequence for which this backward is faster."""
_SCORES = 1 << 22  # scores computed at a time: two buffers of 8 MB, which stay in the cores' caches
_PIECES = 3  # bfloat16 numbers whose sum is as exact as a float32 number
_FURTHER = 8  # further columns: three are used, but rows of a multiple of 16 bytes are faster


def suits_cpu_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Return True if `cpu_attention` can replace PyTorch's attention here, and is faster.

    Heads do not count: where keys and values have fewer, the caller repeats them.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.requires_grad
        and torch.is_grad_enabled()
        and query.shape[2:] == key.shape[2:] == value.shape[2:]
        and query.shape[2] <= LONGEST
        and (mask is None or mask.dtype == torch.bool)
        and not dropout
    )


@torch.compiler.disable
def cpu_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return `softmax(query @ key.T * scale) @ value` for each head.

    Args:
        query, key, value: (B, H, S, D), bfloat16.
        mask: (B or 1, 1, S, S) bool, True where a query (row) sees a key; None for causal attention.

    Returns:
        (B, H, S, D) in the query's dtype.
    """
    return _Attention.apply(query, key, value, mask, scale)


class _Attention(torch.autograd.Function):
    """PyTorch's forward, with what it saves (output and logsumexp), and the backward of this file."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out, logsumexp_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=_additive(mask, query.dtype), scale=scale
        )
        ctx.save_for_backward(query, key, value, mask, out, logsumexp_BHS)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, logsumexp_BHS = ctx.saved_tensors
        batch, heads, seq, size = query.shape
        # delta (B, H, S) = d_out . out, in float32
        delta_BHS = torch.linalg.vecdot(grads[0].float(), out.float())
        # Further columns (X = D + 8): -L / scale beside q and -delta beside d_out, ones beside k and v
        queries, d_outs = _extended(query, -logsumexp_BHS / ctx.scale), _extended(grads[0], -delta_BHS)
        keys, values = _extended(key), _extended(value)
        # Gradients of q, k and v (3, B, H, S, D), and two buffers for the scores of `chunk` heads (2, chunk, S, S)
        d_qkv = query.new_empty(3, *query.shape)
        chunk = min(heads, max(1, _SCORES // seq**2))
        buffers, unused = query.new_empty(2, chunk, seq, seq), query.new_empty(())
        for b in range(batch):
            hidden_SS = None if mask is None else ~mask[b if mask.shape[0] > 1 else 0, 0]
            for h in range(0, heads, chunk):
                # One sample and up to `chunk` heads, which H now counts: q, k, v and d_out are (H, S, X)
                part = (b, slice(h, min(h + chunk, heads)))
                q, k, v, d_out = queries[part], keys[part], values[part], d_outs[part]
                weights, d_scores = buffers[:, : q.shape[0]]
                d_q, d_k, d_v = d_qkv[:, b, part[1]]
                # 1. weights (H, S, S) = exp(scale * q (H, S, X) @ k.T (H, X, S)), which is exp(scores - L); 0 if hidden
                torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=ctx.scale, out=weights).exp_()
                if hidden_SS is None:
                    weights.tril_()
                else:
                    weights.masked_fill_(hidden_SS, 0)
                # 2. d_scores (H, S, S) = weights * (d_out (H, S, X) @ v.T (H, X, S)); the product is d_weights - delta
                torch.bmm(d_out, v.transpose(1, 2), out=d_scores).mul_(weights)
                # 3. d_q (H, S, D) = scale * d_scores (H, S, S) @ k (H, S, D)
                torch.baddbmm(unused, d_scores, k[..., :size], beta=0, alpha=ctx.scale, out=d_q)
                # 4. d_k (H, S, D) = scale * d_scores.T (H, S, S) @ q (H, S, D)
                torch.baddbmm(unused, d_scores.transpose(1, 2), q[..., :size], beta=0, alpha=ctx.scale, out=d_k)
                # 5. d_v (H, S, D) = weights.T (H, S, S) @ d_out (H, S, D)
                torch.bmm(weights.transpose(1, 2), d_out[..., :size], out=d_v)
        return *d_qkv.unbind(0), None, None


def _extended(x_BHSD: Tensor, number_BHS: Tensor | None = None) -> Tensor:
    """Return `x` with `_FURTHER` columns appended: (B, H, S, D + 8) in x's dtype.

    The first `_PIECES` of them hold a float32 number per row, split into pieces of x's dtype. Without a number they
    hold ones, which multiply the pieces of the other factor.
    """
    *shape, size = x_BHSD.shape
    extended = x_BHSD.new_zeros(*shape, size + _FURTHER)
    extended[..., :size] = x_BHSD
    if number_BHS is None:
        extended[..., size : size + _PIECES] = 1
        return extended
    # Each piece is the number rounded to x's dtype; the next piece is what the rounding lost.
    for column in range(size, size + _PIECES):
        extended[..., column] = number_BHS
        number_BHS = number_BHS - extended[..., column]
    return extended


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask for the operator to add to scores: 0 where a query sees a key, minus infinity elsewhere."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
