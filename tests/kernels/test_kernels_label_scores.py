"""Scores of labelled tokens with trained rows of the head equal those of whole logits, and so do the gradients."""

import pytest
import torch
from torch import Tensor

from lola_ft.kernels import label_scores as module
from lola_ft.kernels.label_scores import label_scores
from lola_ft.kernels.loss import TokenRows

B, S, D, V = 2, 7, 12, 40
IDS = torch.tensor([3, 17])


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, rows = torch.randn(B, S, D, requires_grad=True), torch.randn(len(IDS), D, requires_grad=True)
    labels = torch.randint(0, V, (B, S))
    labels[0, :4], labels[1, 2], labels[1, 5] = -100, 3, 17
    return x, torch.randn(V, D), labels, rows


@pytest.mark.parametrize("trained", [True, False])
def test_scores_and_gradients_are_those_of_whole_logits(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", 3)  # several chunks, the last one partial
    x, head, labels, rows = inputs()
    scores = label_scores(x, head, labels, TokenRows(IDS, rows) if trained else None)
    weights = torch.randn(scores.log_probs_BS.shape)
    (scores.log_probs_BS * weights).sum().backward()
    found, x.grad = x.grad, None
    found_rows, rows.grad = rows.grad, None

    whole = head.index_copy(0, IDS, rows) if trained else head
    logits = x[:, :-1] @ whole.t()
    mask = labels[:, 1:] != -100
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0] * mask
    (log_probs * weights).sum().backward()

    torch.testing.assert_close(scores.log_probs_BS, log_probs)
    torch.testing.assert_close(found, x.grad)
    assert torch.equal(scores.mask_BS, mask)
    torch.testing.assert_close(scores.entropy_BS, -(all_log_probs.exp() * all_log_probs).sum(-1) * mask)
    torch.testing.assert_close(scores.mean_logits_BS, logits.mean(-1) * mask)
    assert torch.equal(scores.is_top1_BS, (logits.argmax(-1) == labels[:, 1:]) & mask)
    if trained:
        torch.testing.assert_close(found_rows, rows.grad)
    else:
        assert found_rows is None


def test_nothing_labelled_has_a_gradient_of_zero() -> None:
    x, head, labels, rows = inputs()
    scores = label_scores(x, head, torch.full_like(labels, -100), TokenRows(IDS, rows))
    scores.log_probs_BS.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
