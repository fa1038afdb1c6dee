"""Nano bases of other families: as active as LOLA's, loaded by stock transformers, fine-tuned and merged."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_ft.errors import UserError
from lola_ft.families import BLOOM, FAMILIES, GPT2, LOLA, Architecture, Family
from lola_ft.nano import NanoSettings, build, build_nano
from lola_ft.nano.settings import nano_architecture
from lola_ft.quantization import load_base
from tests.conftest import Outcome, assert_says
from tests.grids import slow_but
from tests.nano.conftest import TINY

POSSIBLE = [family for family in FAMILIES.values() if family is not BLOOM]
OLMOE = FAMILIES["olmoe"]
IDS = torch.tensor([[20, 30, 40, 50, 60, 70]])


def in_layers(architecture: Architecture) -> int:
    """Active parameters but for the output head: of the layers and the final norm."""
    sizes = architecture.sizes
    return architecture.active_parameters - sizes.vocab * sizes.hidden


@pytest.mark.parametrize("family", POSSIBLE, ids=lambda family: family.model_type)
def test_as_many_parameters_are_active_per_token_as_in_lola(family: Family) -> None:
    lola, other = nano_architecture(LOLA, NanoSettings()), nano_architecture(family, NanoSettings())
    assert other.active_parameters == pytest.approx(lola.active_parameters, rel=0.05)
    assert in_layers(other) == pytest.approx(in_layers(lola), rel=0.05)
    assert other.sizes.vocab == lola.sizes.vocab
    assert other.sizes.layers == lola.sizes.layers
    assert other.sizes.num_experts == (16 if family.experts else 0)


@pytest.mark.parametrize("family", POSSIBLE, ids=lambda family: family.model_type)
def test_the_parameters_that_are_said_are_those_of_the_model(family: Family) -> None:
    architecture = nano_architecture(family, NanoSettings())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture.config)
    held = {place.parameter: 0 for place in architecture.places.values() if place.correction}
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in held)
    assert architecture.total_parameters == sum(weight.numel() for weight in model.parameters()) + buffers


def test_active_parameters_are_those_that_multiply_a_token() -> None:
    d, vocab, attention = 128, 6144, 4 * 128 * 128
    inner = nano_architecture(GPT2, NanoSettings()).sizes.inner
    biases, norms = 4 * d + inner + d, 5 * 2 * d
    dense = vocab * d + 2 * (attention + 2 * d * inner + biases) + norms
    assert nano_architecture(GPT2, NanoSettings()).active_parameters == dense
    assert nano_architecture(LOLA, NanoSettings()).active_parameters == dense + 16 * d
    olmoe = nano_architecture(OLMOE, NanoSettings())
    experts, norms = 2 * 3 * d * olmoe.sizes.expert_inner, 4 * d
    assert olmoe.active_parameters == vocab * d + 2 * (attention + 16 * d + experts + norms) + d


def test_an_output_head_of_its_own_counts_and_its_embeddings_do_not() -> None:
    tied = nano_architecture(OLMOE, NanoSettings())
    untied_config = type(tied.config)(**tied.config.to_dict() | {"tie_word_embeddings": False})
    untied = Architecture(OLMOE, untied_config)
    assert untied.active_parameters == tied.active_parameters
    assert untied.total_parameters == tied.total_parameters + prod(tied.places[OLMOE.embeddings[0]].shape)


REFUSALS = {
    "unknown family": (["--family", "t5"], "--family: model_type is 't5' … not supported … olmoe … lola-ft families"),
    "unpackable family": (
        ["--family", "bloom"],
        "no nano base of BLOOM (bloom) … attention … packed … Choose one of lola_v1, olmoe",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_family_of_which_none_can_be_built_is_refused(
    case: str, verb: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, says = REFUSALS[case]
    outcome = verb("nano", *arguments)
    assert outcome.code == 2
    assert_says(outcome.err, says)
    assert list(tmp_path.iterdir()) == []


def test_a_family_whose_narrowest_form_is_larger_than_lola_is_refused() -> None:
    with pytest.raises(UserError, match=r"no nano base of OLMoE .* Raise n_inner"):
        nano_architecture(OLMOE, replace(NanoSettings(), n_inner=8, num_experts=64))


@pytest.mark.usefixtures("two_languages")
def test_the_base_of_another_family_is_not_replaced(tmp_path: Path) -> None:
    settings = replace(TINY, pretrain=replace(TINY.pretrain, steps=1))
    base = build_nano(tmp_path / "base", settings, "gpt2")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(UserError, match=r"holds the nano base of gpt2, not of lola_v1\. Choose another folder"):
        build_nano(base, settings)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


@pytest.mark.usefixtures("two_languages")
@pytest.mark.parametrize("family", slow_but([OLMOE], POSSIBLE), ids=lambda family: family.model_type)
def test_stock_transformers_loads_what_the_verb_builds(
    family: Family, verb: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "NanoSettings", lambda: TINY)
    arguments = () if family is LOLA else ("--family", family.model_type)
    outcome = verb("nano", *arguments)
    assert outcome.code == 0, outcome.err
    base = Path(".cache/nano" if family is LOLA else f".cache/nano-{family.model_type}")
    architecture = nano_architecture(family, TINY)
    said = " ".join(outcome.out.split())
    assert_says(said, f"{architecture.total_parameters:,} parameters, {architecture.active_parameters:,} … active")
    stock, info = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert stock.config.model_type == family.model_type
    torch.testing.assert_close(
        load_base(base, None, "float32", "cpu", quiet=True)(IDS).logits, stock.eval()(IDS).logits
    )
    assert len(AutoTokenizer.from_pretrained(base)) == TINY.vocab_size
    assert "already" in verb("nano", *arguments).out


@pytest.mark.slow
@pytest.mark.usefixtures("two_languages")
def test_a_recipe_and_a_merge_work_on_it(tmp_path: Path, rows_file: Path) -> None:
    base = build_nano(tmp_path / "base", replace(TINY, n_positions=256), "olmoe")
    recipe = {
        "base": {"model": str(base), "dtype": "float32"},
        "adapter": {"attention": {"rank": 4}, "mlp": None, "experts": {"rank": 4}},
        "router": {"mode": "tuned", "aux_loss": 0.01},
        "data": {"sources": [{"path": str(rows_file), "format": "alpaca"}], "max_length": 256, "validation": 0.2},
        "train": {"max_steps": 8, "micro_batch_size": 4, "grad_accum_steps": 1, "learning_rate": 0.02},
        "output": str(tmp_path / "run"),
    }
    YAML().dump(recipe, tmp_path / "recipe.yaml")
    root = Path(__file__).parents[2]
    for script, argument in (("finetune.py", tmp_path / "recipe.yaml"), ("merge.py", tmp_path / "run")):
        done = subprocess.run([sys.executable, root / script, argument], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (merged(IDS).logits - before(IDS).logits).abs().max() > 0.01
