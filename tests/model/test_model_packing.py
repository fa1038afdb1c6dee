"""Documents packed in one row, with restarting positions, give the same numbers as each one in its own row."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from lola_ft.errors import UserError
from lola_ft.model import LolaForCausalLM
from lola_ft.model import packed as packed_module
from lola_ft.model.packed import stretches_of

LENGTHS = (7, 1, 12, 20)
# Float32 sums have another order, over 4 layers. This is the limit to meet.
ROUNDING = 1e-5


@pytest.fixture(autouse=True, params=[512, 16], ids=["one stretch", "stretches"])
def tokens_of_a_stretch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run every test with the row as one stretch, and with stretches of documents up to 16 tokens."""
    monkeypatch.setattr(packed_module, "TOKENS", {"cpu": request.param})
    return int(request.param)


def documents(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 320, (1, length), generator=generator) for length in LENGTHS]


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return one row, and positions that restart at each document."""
    return torch.cat(parts, dim=1), torch.cat([torch.arange(part.shape[1]) for part in parts])[None]


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_gives_the_logits_of_the_document_without_packing(
    attention: str, mode: str, use_cache: bool | None, make_model: Callable[..., LolaForCausalLM]
) -> None:
    """This holds with the default `use_cache`, too. transformers' mask separates documents only without a cache."""
    model = make_model(attn_implementation=attention).train(mode == "train")
    row, positions = packed(documents())
    with torch.no_grad():
        output = model(row, position_ids=positions, use_cache=use_cache, output_router_logits=True)
        start = 0
        for part in documents():
            alone = model(part, use_cache=False, output_router_logits=True)
            span = slice(start, start + part.shape[1])
            assert (output.logits[:, span] - alone.logits).abs().max() < ROUNDING
            for logits_TE, alone_TE in zip(output.router_logits, alone.router_logits, strict=True):
                assert torch.equal(logits_TE[span].argmax(-1), alone_TE.argmax(-1))
            start = span.stop


def test_two_packed_rows_do_not_influence_each_other(model: LolaForCausalLM) -> None:
    first, second = documents(1), documents(2)[::-1]
    (row1, positions1), (row2, positions2) = packed(first), packed(second)
    with torch.no_grad():
        both = model(torch.cat([row1, row2]), position_ids=torch.cat([positions1, positions2])).logits
        for b, (row, positions) in enumerate([(row1, positions1), (row2, positions2)]):
            assert (both[b : b + 1] - model(row, position_ids=positions).logits).abs().max() < ROUNDING


def test_a_leak_would_be_seen(model: LolaForCausalLM) -> None:
    """The tests would find a leak: an ordinary causal mask over the row changes the later documents' logits a lot."""
    parts = documents()
    row, positions = packed(parts)
    with torch.no_grad():
        leaked = model(row, position_ids=positions, attention_mask=torch.ones_like(row)).logits[:, -LENGTHS[-1] :]
        alone = model(parts[-1]).logits
    assert (leaked - alone).abs().max() > 0.1


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_no_document_influences_another(changed: int, model: LolaForCausalLM) -> None:
    parts, others = documents(1), documents(5)
    mixed = [others[i] if i == changed else part for i, part in enumerate(parts)]
    with torch.no_grad():
        before, after = ((model(*packed_arguments(p)).logits) for p in (parts, mixed))
    start = 0
    for i, length in enumerate(LENGTHS):
        difference = (before[:, start : start + length] - after[:, start : start + length]).abs().max()
        # An expert's rows are multiplied together, so another group size may round differently.
        assert (difference > 0.01) if i == changed else (difference < ROUNDING)
        start += length


def packed_arguments(parts: list[Tensor]) -> tuple[Tensor, None, Tensor]:
    row, positions = packed(parts)
    return row, None, positions


def test_packed_gradients_are_the_sum_of_the_documents(make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model().train()
    parts = documents()
    row, positions = packed(parts)
    labels = row.clone()
    labels[positions == 0] = -100  # the first token of a document is not predicted
    count = int((labels != -100).sum())
    model(row, position_ids=positions, labels=labels, num_items_in_batch=count).loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part in parts:
        model(part, labels=part, num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_packed_row_may_be_longer_than_the_context(model: LolaForCausalLM) -> None:
    parts = documents() + documents(3)
    row, positions = packed(parts)
    assert row.shape[1] > model.config.n_positions
    with torch.no_grad():
        logits = model(row, position_ids=positions).logits[:, -LENGTHS[-1] :]
        assert (logits - model(parts[-1]).logits).abs().max() < ROUNDING


@pytest.mark.parametrize("given", ["nothing", "positions", "cache", "cache and positions"])
def test_a_sequence_beyond_the_positions_is_refused(given: str, model: LolaForCausalLM) -> None:
    row = torch.full((2, 65), 7)
    arguments: dict[str, object] = {}
    if "cache" in given:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(row[:, :60], past_key_values=cache)
        row, arguments = row[:, 60:], {"past_key_values": cache}
    if "positions" in given:
        arguments["position_ids"] = torch.arange(65)[None, -row.shape[1] :]
    with pytest.raises(UserError, match="65 tokens long, but this model has 64 learned positions"):
        model(row, **arguments)


def test_stretches_are_whole_documents_put_together(tokens_of_a_stretch: int) -> None:
    _, positions = packed(documents())
    stretches = stretches_of(positions)
    if tokens_of_a_stretch == 512:
        assert stretches is None
        return
    assert stretches is not None
    assert [(start, stop) for start, stop, _ in stretches] == [(0, 8), (8, 20), (20, 40)]
    assert [mask is None for _, _, mask in stretches] == [False, True, True]
    mask = stretches[0].mask
    assert mask is not None
    assert mask[0, 0, 7].tolist() == [False] * 7 + [True], "the second document sees nothing of the first"
    assert torch.equal(mask[0, 0, :7, :7], torch.ones(7, 7).tril().bool())


@pytest.mark.parametrize("lengths", [(40,), (3, 30), (30, 3), (16, 16, 1), (5,) * 9, (1,) * 33, (17, 17)])
def test_stretches_cover_every_token_once(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "TOKENS", {"cpu": 16})
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    stretches = stretches_of(positions)
    if len(lengths) == 1:
        assert stretches is None
        return
    assert stretches is not None
    assert [start for start, _, _ in stretches] == [0, *(stop for _, stop, _ in stretches[:-1])]
    assert stretches[-1].stop == sum(lengths)
    starts = {sum(lengths[:place]) for place in range(len(lengths))}
    assert all(start in starts for start, _, _ in stretches)
    assert all(stop - start <= max(16, *lengths) for start, stop, _ in stretches)


def test_several_rows_and_one_document_stay_as_they_are() -> None:
    assert stretches_of(torch.arange(600)[None]) is None
    assert stretches_of(torch.arange(300).repeat(2, 2)) is None
