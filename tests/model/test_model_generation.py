"""Generation: caches, left padding, sampling, beams, and the end of the context."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from lola_ft.errors import UserError
from lola_ft.model import LolaForCausalLM

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
# Float32 sums have another order, over 4 layers.
ROUNDING = 1e-5


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(6, 320, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[Tensor], pad: int = 1) -> tuple[Tensor, Tensor]:
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=pad) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - p.shape[1] for p in prompts]).long()
    return ids, mask


def test_with_and_without_cache_the_same_tokens(model: LolaForCausalLM) -> None:
    cached, plain = (model.generate(prompt(9), max_new_tokens=20, use_cache=use, **GREEDY) for use in (True, False))
    assert cached.shape == (1, 29)
    assert cached.tolist() == plain.tolist()
    assert len(set(cached[0, 9:].tolist())) > 1


def test_a_static_cache_gives_the_same_tokens(model: LolaForCausalLM) -> None:
    expected = model.generate(prompt(9), max_new_tokens=12, **GREEDY)
    actual = model.generate(prompt(9), max_new_tokens=12, cache_implementation="static", disable_compile=True, **GREEDY)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_over_a_cache_in_steps_of_any_size(attention: str, make_model: Callable[..., LolaForCausalLM]) -> None:
    model = make_model(attn_implementation=attention)
    ids, cache, start = prompt(30), DynamicCache(config=model.config), 0
    with torch.no_grad():
        whole = model(ids).logits
        for size in (1, 11, 1, 4, 13):
            step = model(ids[:, start : start + size], past_key_values=cache)
            assert (step.logits - whole[:, start : start + size]).abs().max() < ROUNDING
            start += size
    assert cache.get_seq_length() == 30


def test_left_padded_batch_equals_single_prompts(model: LolaForCausalLM) -> None:
    prompts = [prompt(3, 1), prompt(11, 2), prompt(7, 3)]
    ids, mask = left_padded(prompts)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=15, **GREEDY)
    for row, alone in zip(batch, prompts, strict=True):
        assert row[-15:].tolist() == model.generate(alone, max_new_tokens=15, **GREEDY)[0, -15:].tolist()


def test_what_stands_in_the_padding_does_not_matter(model: LolaForCausalLM) -> None:
    prompts = [prompt(3, 1), prompt(11, 2)]
    outputs = []
    for pad in (1, 99):
        ids, mask = left_padded(prompts, pad)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()])
    assert (outputs[0] - outputs[1]).abs().max() < ROUNDING


def test_right_padding_does_not_matter_either(model: LolaForCausalLM) -> None:
    ids = prompt(12)
    mask = (torch.arange(12) < 8).long()[None]
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits[:, :8]
        assert (padded - model(ids[:, :8]).logits).abs().max() < ROUNDING


def test_generation_stops_at_the_end_token(model: LolaForCausalLM) -> None:
    free = model.generate(prompt(9), max_new_tokens=20, **GREEDY)[0, 9:].tolist()
    end = free[5]
    stopped = model.generate(prompt(9), max_new_tokens=20, **GREEDY | {"eos_token_id": end})[0, 9:].tolist()
    assert stopped == free[: free.index(end) + 1]


def test_sampling_follows_the_seed_and_beams_find_no_worse(model: LolaForCausalLM) -> None:
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = GREEDY | {"do_sample": True, "top_k": 50}
        samples.append(model.generate(prompt(9), max_new_tokens=12, **options).tolist())
    assert samples[0] == samples[1] != samples[2]
    greedy, beams = (model.generate(prompt(9), max_new_tokens=8, num_beams=n, **GREEDY) for n in (1, 4))
    assert log_likelihood(model, beams) >= log_likelihood(model, greedy) - ROUNDING


def log_likelihood(model: LolaForCausalLM, ids: Tensor) -> float:
    """Return the log-likelihood of the eight tokens after the prompt."""
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[:, :-1]
    return float(log_probs.gather(-1, ids[:, 1:, None])[:, -8:].sum())


def test_generation_stops_with_a_message_at_the_last_position(model: LolaForCausalLM) -> None:
    assert model.generate(prompt(60), max_new_tokens=5, **GREEDY).shape == (1, 65)
    with pytest.raises(UserError, match="65 tokens long, but this model has 64 learned positions"):
        model.generate(prompt(60), max_new_tokens=6, **GREEDY)


def test_left_padding_may_be_wider_than_the_context(model: LolaForCausalLM) -> None:
    """Only the positions of real tokens count."""
    ids, mask = left_padded([prompt(50, 1)])
    ids, mask = (torch.nn.functional.pad(t, (10, 0)) for t in (ids, mask))
    wide = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert wide[0, -8:].tolist() == model.generate(prompt(50, 1), max_new_tokens=8, **GREEDY)[0, -8:].tolist()


def test_eager_and_sdpa_attention_agree(make_model: Callable[..., LolaForCausalLM]) -> None:
    ids, mask = left_padded([prompt(6, 1), prompt(14, 2)])
    outputs = {}
    for attention in ("sdpa", "eager"):
        model = make_model(attn_implementation=attention)
        with torch.no_grad():
            outputs[attention] = model(ids, attention_mask=mask, output_attentions=attention == "eager")
    real = mask.bool()
    assert (outputs["sdpa"].logits[real] - outputs["eager"].logits[real]).abs().max() < ROUNDING
    for weights_BHSS in outputs["eager"].attentions:
        assert weights_BHSS.shape == (2, 4, 14, 14)
        sums = weights_BHSS.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        # Padding may attend to anything. Real tokens attend neither to later tokens nor to padding.
        assert (weights_BHSS[1].triu(1) == 0).all()
        assert (weights_BHSS[0, :, 8:].triu(9) == 0).all()
        assert (weights_BHSS[0, :, 8:, :8] == 0).all()


@pytest.mark.parametrize("options", [{}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_attention_equals_the_plain_formula(
    options: dict[str, bool], make_model: Callable[..., LolaForCausalLM]
) -> None:
    """GPT-2's attention: softmax(q k / sqrt(d)) v for heads of width d; optionally not scaled, or also by layer."""
    attention = make_model(**options).transformer.h[2].attn
    x = torch.randn(1, 9, 64)
    with torch.no_grad():
        q, k, v = attention.c_attn(x).split(64, dim=-1)
        heads = []
        for h in range(4):
            part = slice(16 * h, 16 * h + 16)
            scale = 1.0 if options.get("scale_attn_weights") is False else 16**-0.5
            scale /= 3 if options.get("scale_attn_by_inverse_layer_idx") else 1
            scores = q[0, :, part] @ k[0, :, part].t() * scale
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[0, :, part])
        expected = torch.cat(heads, -1) @ attention.c_proj.weight.t() + attention.c_proj.bias
        actual, _ = attention(x, None, None)
    torch.testing.assert_close(actual[0], expected)


def test_only_the_wanted_logits_are_computed(model: LolaForCausalLM) -> None:
    ids = prompt(9)
    with torch.no_grad():
        whole = model(ids).logits
        last, kept = (model(ids, logits_to_keep=keep).logits for keep in (1, torch.tensor([2, 5])))
    torch.testing.assert_close(last, whole[:, -1:])
    torch.testing.assert_close(kept, whole[:, [2, 5]])


def test_embeddings_instead_of_ids_give_the_same_logits(model: LolaForCausalLM) -> None:
    ids = prompt(9)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_a_tuple_of_outputs_holds_the_same_logits(model: LolaForCausalLM) -> None:
    with torch.no_grad():
        logits = model(prompt(9), return_dict=False)[0]
        assert torch.equal(logits, model(prompt(9)).logits)


def test_attention_weights_of_sdpa_are_refused(model: LolaForCausalLM) -> None:
    with pytest.raises(
        UserError, match=r"sdpa attention does not compute attention weights.*set_attn_implementation\('eager'\)"
    ):
        model(prompt(4), output_attentions=True)


def test_flex_attention_is_refused_on_a_cpu(make_model: Callable[..., LolaForCausalLM]) -> None:
    with pytest.raises(UserError, match="flex attention, compiled for a CPU, returns NaN"):
        make_model(attn_implementation="flex_attention")(prompt(4))


FLEX = """
import torch
from lola_ft.model import LolaConfig, LolaForCausalLM

torch.manual_seed(0)
config = LolaConfig(vocab_size=320, n_positions=64, n_embd=64, n_head=4, n_layer=4, num_experts=4)
model = LolaForCausalLM(config).eval()
ids = torch.randint(6, 320, (2, 14))
mask = torch.ones_like(ids)
mask[0, :8] = 0
padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
packed = {"position_ids": torch.cat([torch.arange(5), torch.arange(9)]).expand(2, -1)}
for arguments, real in ((padded, mask.bool()), (packed, torch.ones_like(mask).bool())):
    logits = {}
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(ids, **arguments).logits[real]
    print((logits["sdpa"] - logits["flex_attention"]).abs().max().item())
"""


@pytest.mark.slow
def test_flex_attention_agrees_with_sdpa_where_it_is_not_compiled() -> None:
    """They agree in padded and in packed batches. Compiled flex attention needs a GPU."""
    off = {"TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FLEX], capture_output=True, text=True, env=os.environ | off, check=True
    )
    differences = [float(line) for line in done.stdout.splitlines()]
    assert len(differences) == 2
    assert max(differences) < ROUNDING
