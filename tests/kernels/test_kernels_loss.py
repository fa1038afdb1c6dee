"""The loss without a whole batch of logits, compared with F.cross_entropy.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lola_ft.kernels import loss as loss_module
from lola_ft.kernels.loss import TokenRows, label_nats, labelled_cross_entropy


def make_batch(
    batch: int = 3, seq: int = 20, hidden: int = 16, vocab: int = 50, labelled: float = 0.6
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and labels, of which about the share `labelled` is not -100."""
    generator = torch.Generator().manual_seed(seq)
    x = torch.randn(batch, seq, hidden, generator=generator).requires_grad_()
    head = torch.randn(vocab, hidden, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) >= labelled] = -100
    return x, head, labels


def plain(x_BSD: Tensor, head_VD: Tensor, labels_BS: Tensor, divisor: int | None = None) -> Tensor:
    logits = (x_BSD @ head_VD.t())[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels_BS[:, 1:].flatten(), reduction="sum")
    return total / (int((labels_BS[:, 1:] != -100).sum()) if divisor is None else divisor)


def with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("labelled", [1.0, 0.6, 0.05])
@pytest.mark.parametrize("divisor", [None, 7, 1000])
def test_loss_and_gradients_are_those_of_cross_entropy(labelled: float, divisor: int | None) -> None:
    x, head, labels = make_batch(labelled=labelled)
    expected = with_gradients(plain(x, head, labels, divisor), x, head)
    actual = with_gradients(labelled_cross_entropy(x, head, labels, divisor), x, head)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 512, 513])
def test_chunk_boundaries_do_not_change_loss_and_gradients(rows: int) -> None:
    x, head, labels = make_batch(batch=1, seq=rows + 1, labelled=1.0)
    expected = with_gradients(plain(x, head, labels), x, head)
    actual = with_gradients(labelled_cross_entropy(x, head, labels), x, head)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)  # sums over 513 rows have another order


def test_the_gradient_is_scaled_by_the_incoming_gradient() -> None:
    x, head, labels = make_batch()
    expected = with_gradients(plain(x, head, labels) * 3.5, x, head)
    actual = with_gradients(labelled_cross_entropy(x, head, labels) * 3.5, x, head)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_number_of_items_may_be_a_tensor() -> None:
    x, head, labels = make_batch()
    assert torch.equal(
        labelled_cross_entropy(x, head, labels, torch.tensor(40)), labelled_cross_entropy(x, head, labels, 40)
    )


def test_nothing_labelled_is_a_differentiable_zero() -> None:
    x, head, labels = make_batch()
    for none in (torch.full_like(labels, -100), labels[:, :1]):
        loss = labelled_cross_entropy(x[:, : none.shape[1]], head, none)
        value, d_x, d_head = with_gradients(loss, x, head)
        assert value == 0
        assert (d_x == 0).all()
        assert (d_head == 0).all()


def test_the_first_label_is_ignored() -> None:
    x, head, labels = make_batch()
    changed = labels.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 50
    assert torch.equal(labelled_cross_entropy(x, head, labels), labelled_cross_entropy(x, head, changed))


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    x, head, labels = make_batch()
    expected = with_gradients(plain(x, head, labels), x)
    head.requires_grad_(False)
    for got, wanted in zip(with_gradients(labelled_cross_entropy(x, head, labels), x), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_trained_head_over_frozen_states_gets_its_gradient() -> None:
    x, head, labels = make_batch()
    expected = with_gradients(plain(x, head, labels), head)
    actual = with_gradients(labelled_cross_entropy(x.detach(), head, labels), head)
    torch.testing.assert_close(actual[1], expected[1])


def test_evaluation_computes_no_gradient() -> None:
    x, head, labels = make_batch()
    with torch.no_grad():
        assert torch.equal(labelled_cross_entropy(x, head, labels), labelled_cross_entropy(x, head, labels).detach())


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    x, head, labels = make_batch()
    labels[0, 5] = 50
    with pytest.raises(IndexError):
        labelled_cross_entropy(x, head, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_a_float32_loss(dtype: torch.dtype) -> None:
    """Softmax and sum are float32. States, head and their gradients keep their dtype."""
    x, head, labels = make_batch()
    expected = with_gradients(plain(x, head, labels), x, head)
    x16, head16 = x.detach().to(dtype).requires_grad_(), head.detach().to(dtype).requires_grad_()
    actual = with_gradients(labelled_cross_entropy(x16, head16, labels), x16, head16)
    assert [tensor.dtype for tensor in actual] == [torch.float32, dtype, dtype]
    for got, wanted in zip(actual, expected, strict=True):
        # Relative to the largest entry, with 8 bits of mantissa in the factors. Measured: 0.007.
        assert (got.float() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_bfloat16_states_and_a_float32_head_keep_their_dtypes() -> None:
    """The dtypes under autocast: the last norm in bfloat16, embeddings in float32."""
    x, head, labels = make_batch()
    x16 = x.detach().to(torch.bfloat16).requires_grad_()
    expected = with_gradients(plain(x16.float(), head, labels), x16, head)
    actual = with_gradients(labelled_cross_entropy(x16, head, labels), x16, head)
    assert actual[1].dtype == torch.bfloat16
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
    torch.testing.assert_close(actual[2], expected[2])


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that an operation returns."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocab:
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return out


@pytest.mark.parametrize(("labelled", "limit"), [(1.0, 8), (0.1, 8)])
def test_no_more_rows_than_a_chunk_are_ever_scored(
    labelled: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", limit)
    vocab = 4099  # no other size is this prime
    x, head, labels = make_batch(batch=4, seq=30, hidden=3, vocab=vocab, labelled=labelled)
    expected = with_gradients(plain(x, head, labels), x, head)
    with LargestTensor(vocab) as seen:
        actual = with_gradients(labelled_cross_entropy(x, head, labels), x, head)
    assert 0 < seen.rows <= limit
    with LargestTensor(vocab) as without_chunks:
        plain(x, head, labels)
    assert without_chunks.rows == 4 * 30
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_unlabelled_rows_are_not_scored() -> None:
    x, head, labels = make_batch(batch=2, seq=100, hidden=3, vocab=4099, labelled=1.0)
    labels[:, :-6] = -100
    with LargestTensor(4099) as seen:
        labelled_cross_entropy(x, head, labels)
    assert seen.rows == 16  # twice 6, padded to one of few sizes


def test_products_of_any_number_of_rows_have_few_sizes() -> None:
    """A CPU's matrix library builds and keeps a kernel for each size."""
    sizes = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if function.overloadpacket is torch.ops.aten.mm:
                sizes.add(args[0].shape[0])
            return function(*args, **(kwargs or {}))

    x, head, _ = make_batch(batch=1, seq=2, hidden=4, vocab=8)
    for rows in range(1, 600):
        with Sizes():
            labelled_cross_entropy(x[:, :1].expand(1, rows + 1, 4), head.detach(), torch.zeros(1, rows + 1).long())
    assert len(sizes) < 30
    assert max(sizes) == 256


@pytest.mark.parametrize("rows", [1, 5, 255, 257, 300])
def test_rows_that_fill_a_chunk_leave_no_trace(rows: int) -> None:
    x, head, labels = make_batch(batch=1, seq=rows + 1, labelled=1.0)
    ids, own = torch.tensor([3, 7]), torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    replaced = head.index_copy(0, ids, own)
    expected = with_gradients(plain(x, replaced, labels), x, own)
    actual = with_gradients(labelled_cross_entropy(x, head.detach(), labels, trained=TokenRows(ids, own)), x, own)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    logits = (x @ replaced.t())[0, :-1]
    nats = F.cross_entropy(logits, labels[0, 1:], reduction="none")
    torch.testing.assert_close(label_nats(x, head, labels, TokenRows(ids, own)), nats.detach(), atol=1e-5, rtol=1e-5)
