"""Attention for training in bfloat16 on a CPU with matrix units, for sequences of a few hundred tokens.

PyTorch's fused attention is quick forward; backward (2.13) it takes as long in bfloat16 as in float32, a fifth of a
training step, for it does not use the units. Here backward is five large products for some heads at a time. Where
sequences are long, what that computes in vain, right of the diagonal, costs more than is gained.

Shapes: B batch, H heads, S sequence, D head size.
"""

from typing import Any

import torch
from torch import Tensor

LONGEST = 512
"""Tokens of a sequence."""
_SCORES = 1 << 22  # at a time: two such buffers, of 8 MB, stay near the cores
_PIECES = 3  # of a number in bfloat16, to be as exact as in float32
_FURTHER = 8  # columns; three would do, but rows of whole 16 bytes are quicker


def suits_cpu_attention(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether `cpu_attention` may take the place of PyTorch's own, and is quicker."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and torch.is_grad_enabled()
        and query.shape == key.shape
        and query.shape[2] <= LONGEST
        and (mask is None or mask.dtype == torch.bool)
        and not dropout
    )


@torch.compiler.disable
def cpu_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(query @ key.T * scale) @ value` for each head, all (B, H, S, D).

    Args:
        mask: (B or 1, 1, S, S) bool, True where a query (row) sees a key; None for causal attention.
    """
    return _Attention.apply(query, key, value, mask, scale)


class _Attention(torch.autograd.Function):
    """Forward is PyTorch's, and so is what it saves."""

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
        # exp(scores - logsumexp) are the weights, and what flows back to them is d_out @ value - delta. Both
        # differences come out of the products, by further columns: after them, in bfloat16, they would be too coarse.
        delta_BHS = torch.linalg.vecdot(grads[0].float(), out.float())
        queries, d_outs = _extended(query, -logsumexp_BHS / ctx.scale), _extended(grads[0], -delta_BHS)
        keys, values = _extended(key), _extended(value)
        d_qkv = query.new_empty(3, *query.shape)
        chunk = min(heads, max(1, _SCORES // seq**2))
        buffers, unused = query.new_empty(2, chunk, seq, seq), query.new_empty(())
        for b in range(batch):
            hidden_SS = None if mask is None else ~mask[b if mask.shape[0] > 1 else 0, 0]
            for h in range(0, heads, chunk):
                part = (b, slice(h, min(h + chunk, heads)))
                q, k, v, d_out = queries[part], keys[part], values[part], d_outs[part]
                weights, d_scores = buffers[:, : q.shape[0]]
                d_q, d_k, d_v = d_qkv[:, b, part[1]]
                torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=ctx.scale, out=weights).exp_()
                if hidden_SS is None:
                    weights.tril_()
                else:
                    weights.masked_fill_(hidden_SS, 0)
                torch.bmm(d_out, v.transpose(1, 2), out=d_scores).mul_(weights)
                torch.baddbmm(unused, d_scores, k[..., :size], beta=0, alpha=ctx.scale, out=d_q)
                torch.baddbmm(unused, d_scores.transpose(1, 2), q[..., :size], beta=0, alpha=ctx.scale, out=d_k)
                torch.bmm(weights.transpose(1, 2), d_out[..., :size], out=d_v)
        return *d_qkv.unbind(0), None, None


def _extended(x_BHSD: Tensor, number_BHS: Tensor | None = None) -> Tensor:
    """`x` with further columns: a float32 number in pieces of its dtype, or the ones that meet these in a product."""
    *shape, size = x_BHSD.shape
    extended = x_BHSD.new_zeros(*shape, size + _FURTHER)
    extended[..., :size] = x_BHSD
    if number_BHS is None:
        extended[..., size : size + _PIECES] = 1
        return extended
    for column in range(size, size + _PIECES):
        extended[..., column] = number_BHS
        number_BHS = number_BHS - extended[..., column]
    return extended


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a query sees a key and minus infinity elsewhere, as the operator takes it."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
