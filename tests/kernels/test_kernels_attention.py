"""The CPU's attention in bfloat16, compared with the plain formula in double precision and with PyTorch's attention.

Shape suffixes: B batch, H heads, S sequence, D head size.
"""

import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lola_ft.kernels import attention
from lola_ft.kernels.attention import cpu_attention, suits_cpu_attention
from lola_ft.kernels.precision import has_bfloat16

SHAPES = [(1, 1, 1, 8), (2, 3, 7, 8), (1, 2, 64, 16), (3, 4, 130, 64)]


def leaves(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Return query, key and value as views into one tensor, like the output of a joint projection."""
    batch, heads, seq, size = shape
    qkv = torch.randn(batch, seq, 3, heads, size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return [part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2)]


def documents(batch: int, seq: int) -> Tensor:
    """Return a mask of packed documents, which do not see each other."""
    ids = torch.randint(0, 3, (batch, seq), generator=torch.Generator().manual_seed(1)).sort(-1).values
    return ((ids[:, :, None] == ids[:, None]) & torch.ones(seq, seq, dtype=torch.bool).tril())[:, None]


def gradients(out: Tensor, of: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, of, weights.to(out.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-9))
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("scores_at_a_time", [1, 1 << 22])
@pytest.mark.parametrize("masked", ["causal", "documents", "one mask for all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_as_exact_as_bfloat16_allows(
    shape: tuple[int, ...], masked: str, scores_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES", scores_at_a_time)
    batch, _, seq, size = shape
    mask = None if masked == "causal" else documents(batch if masked == "documents" else 1, seq)
    qkv, scale = leaves(shape), size**-0.5

    def plain(*given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*given, attn_mask=mask, is_causal=mask is None)

    doubles = [part.detach().double().requires_grad_() for part in qkv]
    exact = gradients(plain(*doubles), doubles)
    theirs = errors(gradients(plain(*qkv), qkv), exact)
    ours = errors(gradients(cpu_attention(*qkv, mask, scale), qkv), exact)
    assert ours[0] == theirs[0], "forward is PyTorch's own"
    # Measured: at most 0.008; PyTorch's attention has at most 0.005.
    assert all(error < 0.015 for error in ours), (ours, theirs)


def test_large_scores_stay_exact() -> None:
    """The weights are those of forward, although scores around a hundred are computed in bfloat16."""
    qkv = leaves((1, 2, 32, 16))
    qkv[0].data *= 30
    doubles = [part.detach().double().requires_grad_() for part in qkv]
    exact = gradients(F.scaled_dot_product_attention(*doubles, is_causal=True), doubles)
    assert all(error < 0.03 for error in errors(gradients(cpu_attention(*qkv, None, 0.25), qkv), exact))


def test_it_suits_only_short_bfloat16_training_without_dropout() -> None:
    query, key, _ = leaves((1, 2, 8, 16))
    mask = documents(1, 8)
    assert suits_cpu_attention(query, key, key, None, 0.0)
    assert suits_cpu_attention(query, key, key, mask, 0.0)
    assert not suits_cpu_attention(query, key, key, mask.float(), 0.0)
    assert not suits_cpu_attention(query, key, key, None, 0.1)
    assert not suits_cpu_attention(query[:, :, -1:], key, key, None, 0.0)
    assert not suits_cpu_attention(query.detach().float().requires_grad_(), key.float(), key.float(), None, 0.0)
    assert not suits_cpu_attention(query.detach(), key.detach(), key, None, 0.0)
    with torch.no_grad():
        assert not suits_cpu_attention(query, key, key, None, 0.0)
    long, long_key, _ = leaves((1, 1, 513, 8))
    assert not suits_cpu_attention(long, long_key, long_key, None, 0.0)


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16 units")
def test_backward_is_still_faster_than_pytorchs() -> None:
    """If this fails, the attention of this project can be removed."""
    qkv = leaves((4, 8, 512, 64))
    ways: dict[str, Any] = {
        "theirs": F.scaled_dot_product_attention(*qkv, is_causal=True),
        "ours": cpu_attention(*qkv, None, 0.125),
    }
    weights = torch.randn_like(ways["ours"])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(12):
        for name, out in ways.items():
            began = time.perf_counter()
            torch.autograd.grad(out, qkv, weights, retain_graph=True)
            if round_ >= 2:
                times[name].append(time.perf_counter() - began)
    assert statistics.median(t / o for t, o in zip(times["theirs"], times["ours"], strict=True)) > 1
