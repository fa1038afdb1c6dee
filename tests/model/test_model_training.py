"""Training of the dense model: checkpointing, accumulation, dropout in the authors' places."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lola_ft.model import LolaForCausalLM
from lola_ft.model.layers import LolaMoe

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def batch(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids, and labels of the second half of each row."""
    ids = torch.randint(6, 320, (rows, 16), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :8] = -100
    return ids, labels


def gradients(model: LolaForCausalLM, ids: Tensor, labels: Tensor, **arguments: object) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # for dropout
    model(ids, labels=labels, **arguments).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_changes_no_gradient(
    options: dict[str, bool] | None, dropout: dict[str, float], make_model: Callable[..., LolaForCausalLM]
) -> None:
    """Gradients are bit-equal: recomputation drops the same entries and chooses the same experts."""
    model = make_model(**dropout).train()
    expected = gradients(model, *batch())
    model.gradient_checkpointing_enable(options)
    calls = []
    hook = model.transformer.h[1].moe.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(model, *batch())
    hook.remove()
    assert len(calls) == 2, "the layer was not computed again: checkpointing is off"
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_recomputation_keeps_the_first_choice_of_experts(make_model: Callable[..., LolaForCausalLM]) -> None:
    """This holds even if the router's scores differ the second time, by more than rounding."""
    model = make_model().train()
    model.gradient_checkpointing_enable()
    moe = model.transformer.h[1].moe
    scores: list[Tensor] = []
    used: list[Tensor] = []
    moe.gate.register_forward_hook(lambda _, __, out: scores.append(out if not scores else out.flip(-1)) or scores[-1])
    moe.experts.register_forward_pre_hook(lambda _, arguments: used.append(arguments[1]))
    ids, labels = batch()
    model(ids, labels=labels).loss.backward()
    assert len(scores) == len(used) == 2
    assert not torch.equal(scores[0].argmax(-1), scores[1].argmax(-1))
    assert torch.equal(used[0], used[1])


def test_every_parameter_gets_a_gradient(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model().train()
    for name, grad in gradients(model, *batch(8)).items():
        assert grad.abs().max() > 0, name


def test_accumulated_rows_equal_one_batch(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model().train()
    ids, labels = batch(8)
    labels[3, :14] = -100  # rows with different counts, so that a mean of means would differ
    count = int((labels[:, 1:] != -100).sum())
    whole = gradients(model, ids, labels)
    model.zero_grad()
    for row, row_labels in zip(ids, labels, strict=True):
        model(row[None], labels=row_labels[None], num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)


def test_skipping_logits_changes_no_gradient(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model().train()
    expected, actual = gradients(model, *batch()), gradients(model, *batch(), skip_logits=True)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_loss_is_the_cross_entropy_of_the_logits(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model()
    ids, labels = batch()
    with torch.no_grad():
        output = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_the_aux_loss_trains_the_router(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model().train()
    output = model(batch()[0], output_router_logits=True)
    output.aux_loss.backward()
    for n in (1, 3):
        assert model.transformer.h[n].moe.gate.weight.grad.abs().max() > 0


def test_evaluation_drops_nothing(make_model: Callable[..., LolaForCausalLM]) -> None:
    plain, dropping = make_model(), make_model(**DROPOUT)
    ids, _ = batch()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, dropping(ids).logits)
        assert not torch.equal(plain(ids).logits, dropping.train()(ids).logits)


def test_dropout_is_where_the_authors_have_it(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model(resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.1)
    places = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    expected = {"transformer.drop": 0.2}
    for n in range(4):
        expected[f"transformer.h.{n}.attn.resid_dropout"] = 0.3
        expected[f"transformer.h.{n}.{'moe' if n % 2 else 'mlp'}.dropout"] = 0.3
    assert places == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_weights_are_dropped_in_training_only(
    attention: str, make_model: Callable[..., LolaForCausalLM]
) -> None:
    model = make_model(attn_pdrop=0.5, attn_implementation=attention)
    ids, _ = batch()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_expert_output_is_dropped_by_whole_entries(make_model: Callable[..., LolaForCausalLM]) -> None:
    """Entries of the expert's weighted output are dropped (0) or kept and scaled by 1 / (1 - p)."""
    moe: LolaMoe = make_model(resid_pdrop=0.25).transformer.h[1].moe
    x = torch.randn(1, 400, 64)
    with torch.no_grad():
        whole, _ = moe.eval()(x)
        dropped, _ = moe.train()(x)
    kept = dropped != 0
    # 25 600 entries: one standard deviation of the share is 0.0027.
    assert abs(kept.float().mean() - 0.75) < 0.015
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_bfloat16_autocast_trains_like_float32(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model().train()
    expected = gradients(model, *batch())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*batch()[:1], output_router_logits=True)
        assert output.router_logits[0].dtype == torch.float32
        actual = gradients(model, *batch())
    for name, grad in actual.items():
        assert grad.dtype == torch.float32
        # 8 bits of mantissa through 4 layers and back. A token with two close scores may change its expert.
        similarity = nn.functional.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.97, (name, similarity)


def test_initial_weights_are_gpt2s(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model(initializer_range=0.02, n_embd=128, n_inner=512)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 10_000:
            assert abs(parameter.std() - 0.02) < 0.001, name
            assert abs(parameter.mean()) < 0.001, name
