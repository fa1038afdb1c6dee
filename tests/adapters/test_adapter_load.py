"""Loading puts every tensor of a file into its place, on its own base. Saving writes the same tensors."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lola_ft.adapters import load_adapter, save_adapter
from lola_ft.adapters.layouts import LAYOUTS, to_state
from lola_ft.adapters.load_save import adapter_weights
from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.model.conversion import EXPERT_PROJECTIONS
from tests.conftest import make_base
from tests.grids import slow_but
from tests.tiny import TINY

E = 4
# Float32: adding B·A to the weight, against multiplying with A and then B.
ROUNDING = 1e-5

PARTS: dict[str, Callable[[str], bool]] = {
    "everything": lambda _: True,
    "two layers": lambda module: ".h.1." in module or ".h.2." in module,
    "one attention projection": lambda module: module == "transformer.h.2.attn.c_proj",
    "one MoE layer": lambda module: ".h.3.moe.experts" in module,
    "one router": lambda module: module == "transformer.h.3.moe.gate",
    "two experts": lambda module: ".experts.0." in module or ".experts.3." in module,
    "other experts in each layer": lambda module: ".h.1.moe.experts.0." in module or ".h.3.moe.experts.2." in module,
}


@pytest.fixture
def merged_by_hand(fresh: Callable[..., LolaForCausalLM]) -> Callable[[AdapterWeights], LolaForCausalLM]:
    """The base with every update added to its weight. Every way of loading must compute the same."""

    def merge(weights: AdapterWeights) -> LolaForCausalLM:
        model = fresh()
        state = model.state_dict()
        for module, pair in weights.pairs.items():
            delta = pair.alpha / pair.rank * (pair.b.double() @ pair.a.double())  # out×in
            moe, _, rest = module.partition(".experts.")
            if rest:
                expert_id, _, disk_name = rest.partition(".")
                state[f"{moe}.experts.{EXPERT_PROJECTIONS[disk_name]}"][int(expert_id)] += delta.t().float()
            else:
                state[f"{module}.weight"] += delta.float()
        for name, tensor in weights.trained.items():
            state[name].copy_(tensor)
        return model

    return merge


FAST_PARTS = [
    ("everything", "per_expert"),
    ("one attention projection", "peft"),
    ("one router", "peft"),
    ("two experts", "per_expert"),
    ("other experts in each layer", "peft"),
]


@pytest.mark.parametrize(("part", "layout"), slow_but(FAST_PARTS, itertools.product(PARTS, LAYOUTS)))
def test_an_adapter_on_any_parts_computes_base_plus_update(
    part: str,
    layout: str,
    make_weights: Callable[..., AdapterWeights],
    merged_by_hand: Callable[[AdapterWeights], LolaForCausalLM],
    fresh: Callable[..., LolaForCausalLM],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    groups = {"c_attn": (4, 8.0), "attn_c_proj": (3, 2.0), "mlp_up": (5, 8.0), "up": (2, 8.0), "down": (6, 3.0)}
    weights = make_weights(router=True, only=PARTS[part], **groups)
    write_adapter(weights, tmp_path / "adapter", layout)
    model = load_adapter(fresh(), tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    expected = merged_by_hand(weights)(ids).logits
    assert (expected - fresh()(ids).logits).abs().max() > 1e-3
    assert_close(model(ids).logits, expected, atol=ROUNDING, rtol=0)

    # Saving writes what was loaded. Experts that were left out come back as zeros.
    again = adapter_weights(model)
    assert again.trained.keys() == weights.trained.keys()
    assert {module for module in again.pairs if again.delta(module).any()} == set(weights.pairs)
    for module, pair in weights.pairs.items():
        assert torch.equal(again.pairs[module].a, pair.a)
        assert torch.equal(again.pairs[module].b, pair.b)
        assert again.scaling(module) == weights.scaling(module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_saved_and_loaded_it_is_the_same_adapter(
    layout: str,
    quantization: str | None,
    everything: AdapterWeights,
    fresh: Callable[..., LolaForCausalLM],
    ids: Tensor,
    tmp_path: Path,
    same: Callable[[AdapterWeights, AdapterWeights], None],
) -> None:
    write_adapter(everything, tmp_path / "first", "peft")
    first = load_adapter(fresh(quantization), tmp_path / "first")
    save_adapter(first, tmp_path / "second", layout)
    assert read_adapter(tmp_path / "second").layout == layout
    same(read_adapter(tmp_path / "second").weights(TINY), everything)
    second = load_adapter(fresh(quantization), tmp_path / "second")
    assert torch.equal(second(ids).logits, first(ids).logits)


def test_rslora_is_kept(
    make_weights: Callable[..., AdapterWeights], fresh: Callable[..., LolaForCausalLM], ids: Tensor, tmp_path: Path
) -> None:
    groups = {"c_attn": (4, 8.0), "up": (2, 8.0)}
    logits = {}
    for rslora in (False, True):
        weights = make_weights(rslora=rslora, **groups)
        assert weights.scaling("transformer.h.0.attn.c_attn") == (4.0 if rslora else 2.0)
        for layout in LAYOUTS:
            write_adapter(weights, tmp_path / f"{rslora}-{layout}", layout)
            logits[rslora, layout] = load_adapter(fresh(), tmp_path / f"{rslora}-{layout}")(ids).logits
        assert torch.equal(logits[rslora, "peft"], logits[rslora, "per_expert"])
    assert not torch.equal(logits[False, "peft"], logits[True, "peft"])


def test_a_16_bit_base_holds_the_adapter_in_float32(
    everything: AdapterWeights, fresh: Callable[..., LolaForCausalLM], tmp_path: Path, same: Callable[..., None]
) -> None:
    write_adapter(everything, tmp_path / "adapter", "peft")
    same(adapter_weights(load_adapter(fresh(dtype="bfloat16"), tmp_path / "adapter")), everything)


def test_a_loaded_adapter_trains_only_if_asked(
    everything: AdapterWeights, fresh: Callable[..., LolaForCausalLM], ids: Tensor, tmp_path: Path
) -> None:
    write_adapter(everything, tmp_path / "adapter", "peft")
    model = load_adapter(fresh(), tmp_path / "adapter", trainable=True)
    assert model.training
    model(ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == sum(
        tensor.numel() for tensor in to_state(everything, "peft").values()
    )
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


# The base


@pytest.fixture
def foreign(everything: AdapterWeights, tmp_path: Path) -> Path:
    """An adapter that fits the tiny base, but names another base as its own."""
    everything.base_fingerprint = "feedfacefeedface"
    return write_adapter(everything, tmp_path / "foreign", "peft")


def test_an_adapter_of_another_base_is_refused_unless_allowed(
    foreign: Path, fresh: Callable[..., LolaForCausalLM], ids: Tensor
) -> None:
    base = fresh()
    expected = base(ids).logits
    with pytest.raises(AdapterError) as error:
        load_adapter(base, foreign)
    for named in (str(foreign), "feedfacefeedface", base.base_fingerprint, "allow_other_base"):
        assert named in str(error.value)
    assert torch.equal(base(ids).logits, expected)
    assert (load_adapter(base, foreign, allow_other_base=True)(ids).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_transformers_loaded_is_identified_by_its_weights(
    dtype: torch.dtype,
    everything: AdapterWeights,
    fresh: Callable[..., LolaForCausalLM],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    own, other = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype), make_base(tmp_path / "other", seed=7)
    everything.base_fingerprint = fresh().base_fingerprint
    write_adapter(everything, tmp_path / "adapter", "peft")
    save_adapter(load_adapter(own, tmp_path / "adapter"), tmp_path / "again")
    assert read_adapter(tmp_path / "again").metadata["base_fingerprint"] == everything.base_fingerprint
    foreign = AutoModelForCausalLM.from_pretrained(other, dtype=dtype)
    with pytest.raises(AdapterError, match=rf"base {everything.base_fingerprint}.* [0-9a-f]{{16}}"):
        load_adapter(foreign, tmp_path / "adapter")
    # Half precision rounds differently from the file's dtype, so the fingerprint is unknown.
    load_adapter(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float16), tmp_path / "adapter")


def test_an_adapter_names_the_base_it_was_made_on(
    everything: AdapterWeights, fresh: Callable[..., LolaForCausalLM], tmp_path: Path, tiny_base: Path
) -> None:
    write_adapter(everything, tmp_path / "unsigned", "peft")
    base = fresh()
    save_adapter(load_adapter(base, tmp_path / "unsigned"), tmp_path / "signed")
    stored = read_adapter(tmp_path / "signed")
    assert stored.metadata["base_fingerprint"] == base.base_fingerprint
    assert stored.config["base_model_name_or_path"] == ""  # a local path means nothing on other machines
    assert str(tiny_base) not in (tmp_path / "signed" / "adapter_config.json").read_text()
    load_adapter(fresh("nf4", "bfloat16"), tmp_path / "signed")  # the same base in another form


def test_an_adapter_of_another_shape_does_not_change_the_base(
    everything: AdapterWeights, tiny_base: Path, tmp_path: Path, ids: Tensor
) -> None:
    write_adapter(everything, tmp_path / "adapter", "per_expert")
    other = LolaForCausalLM(LolaConfig.from_pretrained(tiny_base, n_inner=96)).eval()
    expected = other(ids).logits
    with pytest.raises(AdapterError, match=r"mlp\.c_fc: .*\[64, 128\].*\[64, 96"):
        load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(ids).logits, expected)
    assert not any("lora" in name for name, _ in other.named_parameters())


@pytest.mark.parametrize("name", ["transformer.wte", "lm_head"])
def test_the_authors_script_e_is_refused_by_name(
    name: str, everything: AdapterWeights, fresh: Callable[..., LolaForCausalLM], tmp_path: Path
) -> None:
    """The authors' script E also adapts the embeddings, which are tied here. Dropping them would change the answers."""
    write_adapter(everything, tmp_path / "adapter", "per_expert")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state: dict[str, Any] = load_file(file)
    kind = ("lora_embedding_A", "lora_embedding_B") if name.endswith("wte") else ("lora_A.weight", "lora_B.weight")
    shapes = ((4, 320), (64, 4)) if name.endswith("wte") else ((4, 64), (320, 4))
    for suffix, shape in zip(kind, shapes, strict=True):
        state[f"base_model.model.{name}.{suffix}"] = torch.ones(shape)
    save_file(state, file)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"rank_pattern": {', '"rank_pattern": {"lm_head": 4,'))
    with pytest.raises(AdapterError, match=name):
        load_adapter(fresh(), tmp_path / "adapter")


def test_a_model_without_an_adapter_has_none_to_save(fresh: Callable[..., LolaForCausalLM], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter to save"):
        save_adapter(fresh(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
