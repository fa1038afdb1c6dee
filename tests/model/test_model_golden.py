"""The native model computes what the authors' own code computed, from the same files (tests/golden)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from lola_ft.families import architecture_of
from lola_ft.model import LolaForCausalLM
from lola_ft.model.router import load_balancing_loss

# Float32 sums have another order; measured: 1.1e-6.
ROUNDING = 3e-6
# From token 60 of the flattened batch on, the recorded base values have noise of the authors' run itself, up to 2.7e-5
# in logits. (The `lora.` values of the same tokens agree to 1e-6.) The limit to meet is 1e-4.
EXACT_TOKENS = 60
NOISE = 5e-5


@pytest.fixture(scope="module")
def ran(golden_model: LolaForCausalLM, golden: dict[str, Tensor]) -> Any:
    """The native model's output for the golden batch, and its gradients by parameter name."""
    golden_model.zero_grad()
    output = golden_model(
        golden["input_ids"],
        attention_mask=golden["attention_mask"],
        labels=golden["labels"],
        output_hidden_states=True,
        output_router_logits=True,
    )
    output.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in golden_model.named_parameters()}
    golden_model.zero_grad()
    return SimpleNamespace(output=output, grads=grads)


def assert_tokens_close(actual_TX: Tensor, expected_TX: Tensor, noise: float = NOISE) -> None:
    assert_close(actual_TX[:EXACT_TOKENS], expected_TX[:EXACT_TOKENS], atol=ROUNDING, rtol=1e-5)
    assert_close(actual_TX, expected_TX, atol=noise, rtol=1e-4)


def test_logits_equal_the_authors(ran: Any, golden: dict[str, Tensor]) -> None:
    assert_tokens_close(ran.output.logits.flatten(0, 1), golden["base.logits"].flatten(0, 1))
    assert (ran.output.logits - golden["base.logits"]).abs().max() < 1e-4


def test_hidden_states_equal_the_authors(ran: Any, golden: dict[str, Tensor]) -> None:
    expected = golden["base.hidden_states"]
    assert len(ran.output.hidden_states) == len(expected) == 5
    for actual_BSD, expected_BSD in zip(ran.output.hidden_states, expected, strict=True):
        assert_tokens_close(actual_BSD.flatten(0, 1), expected_BSD.flatten(0, 1))


def test_loss_equals_the_authors(ran: Any, golden: dict[str, Tensor]) -> None:
    assert_close(ran.output.loss, golden["base.loss"][0], atol=1e-6, rtol=0)


def test_router_logits_and_choices_equal_the_authors(ran: Any, golden: dict[str, Tensor]) -> None:
    expected = golden["base.router_logits"]
    assert len(ran.output.router_logits) == len(expected) == 2
    for actual_TE, expected_TE in zip(ran.output.router_logits, expected, strict=True):
        assert actual_TE.dtype == torch.float32
        # Router logits, and so their noise, are ten times as large as hidden states.
        assert_close(actual_TE[:EXACT_TOKENS], expected_TE[:EXACT_TOKENS], atol=10 * ROUNDING, rtol=1e-5)
        assert_close(actual_TE, expected_TE, atol=5 * NOISE, rtol=1e-4)
        assert torch.equal(actual_TE.argmax(-1), expected_TE.argmax(-1))


def test_every_gradient_equals_the_authors(ran: Any, golden: dict[str, Tensor], golden_base: Path) -> None:
    hub_names = set(load_file(golden_base / "model.safetensors"))
    places = architecture_of(AutoConfig.from_pretrained(golden_base)).places
    for name in hub_names:
        place = places[name]
        grad = ran.grads[place.parameter]
        grad = grad if place.expert is None else grad[place.expert]
        grad = grad.t() if place.transposed else grad
        # The authors' loop skips an expert without tokens, so it has no gradient. The native model's is zero.
        expected = golden.get(f"base.grad.{name}", torch.zeros_like(grad))
        # Noise of the recorded run (see above), relative to the tensor's largest gradient; measured: 2.1e-5.
        limit = 5e-5 * float(expected.abs().max())
        assert_close(grad, expected, atol=limit, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    recorded = {key.removeprefix("base.grad.") for key in golden if key.startswith("base.grad.")}
    assert recorded <= hub_names
    skipped = hub_names - recorded
    assert len(recorded) > 50
    assert all(name.startswith("transformer.h.3.moe.experts.0.") for name in skipped), skipped


def test_greedy_continuation_equals_the_authors(golden_model: LolaForCausalLM, golden: dict[str, Tensor]) -> None:
    expected = golden["base.greedy"]
    actual = golden_model.generate(expected[:, :8], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert actual.tolist() == expected.tolist()


def test_aux_loss_counts_real_tokens_only(ran: Any, golden: dict[str, Tensor]) -> None:
    expected = golden["base.aux_loss_real_tokens"][0]
    assert_close(ran.output.aux_loss, expected, atol=1e-5, rtol=0)
    assert (golden["attention_mask"] == 0).any()
    with_padding = load_balancing_loss(ran.output.router_logits)
    assert abs(with_padding - expected) > 0.01


def test_loss_is_only_the_cross_entropy(golden_model: LolaForCausalLM, golden: dict[str, Tensor], ran: Any) -> None:
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        plain, without_logits = golden_model(**batch), golden_model(**batch, skip_logits=True)
    assert plain.loss == ran.output.loss == without_logits.loss
    assert plain.aux_loss is None
    assert plain.router_logits is None
    assert without_logits.logits is None


def test_save_gives_back_the_same_files(golden_model: LolaForCausalLM, golden_base: Path, tmp_path: Path) -> None:
    golden_model.save_pretrained(tmp_path)
    before, after = load_file(golden_base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (golden_base, tmp_path))
    changed = {key for key in old if new.get(key) != old[key]}
    assert changed <= {"architectures", "torch_dtype", "transformers_version"}


def test_save_and_load_again_changes_nothing(golden_model: LolaForCausalLM, tmp_path: Path) -> None:
    golden_model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = golden_model.state_dict(), again.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
