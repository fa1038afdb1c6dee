"""The code beside the weights gives the numbers of the authors' own code, on three versions of transformers.

Each version runs in its own process, without lola_ft (`drive.py`).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_ft.families import architecture_of
from lola_ft.model import LolaForCausalLM
from tests.standalone.conftest import GOLDEN, OLD_VERSIONS, TEMPLATE, Found, python_with

# The recorded base values have noise of the authors' run itself; see tests/model/test_model_golden.py.
NOISE = 5e-5
# Float32 sums have another order.
ROUNDING = 1e-5
TODAY = "today's"


@pytest.fixture(scope="module", params=[TODAY, *(pytest.param(v, marks=pytest.mark.slow) for v in OLD_VERSIONS)])
def found(request: pytest.FixtureRequest, drive: Callable[[str], Found]) -> Found:
    version = request.param
    found = drive(sys.executable if version == TODAY else python_with(version))
    assert version in (TODAY, found.facts["version"])
    return found


@pytest.fixture(scope="module")
def native(golden: dict[str, Tensor]) -> dict[str, Any]:
    """The native model's output for the golden batch, and the gradient of each Hub tensor."""
    model: LolaForCausalLM = AutoModelForCausalLM.from_pretrained(GOLDEN / "base").eval()
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    output = model(**batch, output_router_logits=True, output_hidden_states=True)
    (output.loss + output.aux_loss).backward()
    grads = {}
    parameters = dict(model.named_parameters())
    for name, place in architecture_of(model.config).places.items():
        grad = parameters[place.parameter].grad
        grad = grad if place.expert is None else grad[place.expert]
        grads[name] = grad.t() if place.transposed else grad
    with torch.no_grad():
        summed = model(**batch, num_items_in_batch=10).loss
    return {"output": output, "grads": grads, "summed": summed, "backbone": output.hidden_states[-1]}


def test_loading_finds_every_weight_without_lola_ft(found: Found) -> None:
    assert not found.facts["lola_ft"]
    model, config = found.facts["classes"]
    assert model.startswith("transformers_modules.")
    assert (model.rpartition(".")[2], config.rpartition(".")[2]) == ("LolaForCausalLM", "LolaConfig")
    assert set(map(tuple, found.facts["loading"].values())) == {()}  # nothing missing, unexpected or mismatched
    assert found.facts["attention"] == "sdpa"
    assert found.facts["tied"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_authors(
    found: Found, attention: str, golden: dict[str, Tensor], native: dict[str, Any]
) -> None:
    logits = found.tensors[f"{attention}.logits"]
    assert_close(logits, golden["base.logits"], atol=NOISE, rtol=1e-4)
    assert_close(logits, native["output"].logits.detach(), atol=ROUNDING, rtol=1e-5)
    assert_close(found.tensors[f"{attention}.hidden_states"], golden["base.hidden_states"], atol=NOISE, rtol=1e-4)
    routers = found.tensors[f"{attention}.router_logits"]
    assert torch.equal(routers.argmax(-1), golden["base.router_logits"].argmax(-1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_equal_the_authors(
    found: Found, attention: str, golden: dict[str, Tensor], native: dict[str, Any]
) -> None:
    assert_close(found.tensors[f"{attention}.loss"], golden["base.loss"][0], atol=1e-6, rtol=0)
    assert_close(found.tensors[f"{attention}.aux_loss"], golden["base.aux_loss_real_tokens"][0], atol=1e-5, rtol=0)
    assert_close(found.tensors["loss_of_10_items"], native["summed"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pass_", ["sdpa", "eager", "checkpointed"])
def test_every_gradient_equals_the_native_models(found: Found, pass_: str, native: dict[str, Any]) -> None:
    """Gradients of loss and balancing loss. tests/model compares the native model's gradients with the authors'."""
    own = {name.partition(".grad.")[2]: grad for name, grad in found.tensors.items() if f"{pass_}.grad." in name}
    assert own.keys() == native["grads"].keys()
    for name, expected in native["grads"].items():
        limit = 1e-5 * max(float(expected.abs().max()), 1e-3)
        assert_close(own[name], expected, atol=limit, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_text_equals_the_authors(found: Found, attention: str, golden: dict[str, Tensor]) -> None:
    expected = golden["base.greedy"].tolist()
    assert found.tensors[f"{attention}.greedy"].tolist() == expected
    assert found.tensors[f"{attention}.greedy_without_cache"].tolist() == expected
    padded = found.tensors[f"{attention}.left_padded"][0].tolist()
    assert padded == [1, 1, 1, 1, *expected[0]]
    beams = (found.tensors[f"{attention}.{name}"].tolist() for name in ("beams", "beams_without_cache"))
    assert len(set(map(str, beams))) == 1


def test_backbone_attentions_and_saved_tensors_are_right(
    found: Found, golden: dict[str, Tensor], native: dict[str, Any]
) -> None:
    assert_close(found.tensors["backbone"], native["backbone"].detach(), atol=ROUNDING, rtol=1e-5)
    assert_close(found.tensors["last_logits"], found.tensors["sdpa.logits"][:, -1:], atol=ROUNDING, rtol=1e-5)
    weights = found.tensors["eager.attentions"]
    assert weights.shape[:2] == (4, len(golden["input_ids"]))
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (weights.triu(1) == 0).all()
    assert (found.tensors["bfloat16.logits"] - golden["base.logits"]).abs().max() < 0.5
    assert all(found.facts["saved"].values())  # `save_pretrained` gives back the checkpoint's tensors
    assert found.facts["saved"].keys() == native["grads"].keys()


def test_tokenizer_and_pipeline_work_without_lola_ft(found: Found, tiny_base: Path) -> None:
    before = AutoTokenizer.from_pretrained(tiny_base)
    assert found.facts["tokens"] == before("Jina langu ni Amina").input_ids
    assert found.facts["template"] == TEMPLATE
    assert found.facts["text"].startswith("Jina langu ni")
    assert len(found.facts["text"]) > len("Jina langu ni")


def test_stock_peft_loads_and_merges_the_authors_adapter(found: Found, golden: dict[str, Tensor]) -> None:
    """The adapter has the layout `per_expert`, with one module per expert."""
    assert_close(found.tensors["lora.logits"], golden["lora.logits"], atol=ROUNDING, rtol=1e-4)
    assert_close(found.tensors["merged.logits"], golden["merged.logits"], atol=ROUNDING, rtol=1e-4)
