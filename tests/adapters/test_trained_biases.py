"""Fully trained biases: the weights that change, the stored tensors, and loading them with stock PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lola_ft.adapters import AdapterSettings, add_adapter, combine_adapters, fitting_layout, load_adapter, save_adapter
from lola_ft.adapters.checksums import CHECKSUMS_KEY
from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.load_save import adapter_weights
from lola_ft.adapters.on_disk import WEIGHTS_FILE, read_adapter, write_adapter
from lola_ft.adapters.trained_bias import TrainedBias
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.families import architecture_of
from lola_ft.quantization import load_base
from lola_ft.quantization.audit import audit
from lola_ft.training.reports.tables import count_trainable
from tests.adapters.test_stock_peft import PARITY, load_stock
from tests.tiny import TINY, tiny_config

D, F, E = 64, 128, 4  # sizes of the tiny base; MoE layers 1 and 3
SELECTION = ((0, 2), (3,))
# Attention's, the dense MLP's and the LayerNorms' in four layers and at the end; those of one expert.
LINEAR, NORMS, EXPERT = 4 * (3 * D + D) + 2 * (F + D), (4 * 2 + 1) * D, F + D


@pytest.fixture
def load(biased_base: Path) -> Callable[..., Any]:
    """Load the base with random biases again."""

    def load(quantization: str | None = None, dtype: str = "float32") -> Any:
        return load_base(biased_base, quantization=quantization, dtype=dtype, device="cpu", quiet=True)

    return load


def move(model: peft.PeftModel, seed: int = 0) -> peft.PeftModel:
    """Add noise to all weights that the active adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "biases", "norms"),
    [
        (AdapterSettings(tune_biases=True), LINEAR + NORMS + 2 * E * EXPERT, 0),
        (AdapterSettings(tune_biases=True, tune_norms=True), LINEAR + 2 * E * EXPERT, 2 * NORMS),
        (AdapterSettings(expert_rank=2, tune_biases=True, selection=SELECTION), LINEAR + NORMS + 3 * EXPERT, 0),
        (AdapterSettings(expert_rank=2, tune_biases=True, selection=((), (1,))), LINEAR + NORMS + EXPERT, 0),
    ],
)
def test_each_bias_is_trained_once(
    settings: AdapterSettings, biases: int, norms: int, load: Callable[..., Any], ids: Tensor
) -> None:
    base = load("nf4")
    expected = base(ids).logits
    model = add_adapter(base, settings).eval()
    assert torch.equal(model(ids).logits, expected)
    counts = count_trainable(model)
    assert counts["biases"][1] == biases
    assert counts.get("norms", (0, 0))[1] == norms
    assert audit(model).counts["biases", "float32"].parameters == biases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norms", "checkpointing"),
    [(False, False), (False, True), (True, False), (True, True)],
)
def test_three_steps_change_only_trained_weights(
    norms: bool, checkpointing: bool, load: Callable[..., Any], ids: Tensor, biased_base: Path
) -> None:
    settings = AdapterSettings(attention_rank=2, expert_rank=2, tune_biases=True, tune_norms=norms, selection=SELECTION)
    base = load("nf4")
    base_logits = base(ids).logits
    torch.manual_seed(0)
    model = add_adapter(base, settings).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained
    model.eval()
    stack = model.base_model.model.transformer.h[1].moe.experts.get_base_layer().up_proj_bias
    original = load_file(biased_base / "model.safetensors")
    for e in range(E):
        own = original[f"transformer.h.1.moe.experts.{e}.c_fc.bias"]
        assert torch.equal(stack[e], own) == (e not in SELECTION[0]), e
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base_logits)
    assert (model(ids).logits - base_logits).abs().max() > 0.1


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradients_are_those_of_the_base_s_own_biases(
    quantization: str | None, load: Callable[..., Any], ids: Tensor
) -> None:
    plain = load(quantization)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    plain(ids, labels=ids).loss.backward()
    model = add_adapter(load(quantization), AdapterSettings(tune_biases=True))
    model(ids, labels=ids).loss.backward()
    grads = {
        name.removeprefix("base_model.model.")
        .replace("parametrizations.", "")
        .removesuffix(".0.trained_bias.default"): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        assert torch.equal(grad, expected[name]), name


def test_trained_biases_are_float32_on_a_16_bit_base(load: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    model = move(add_adapter(load("nf4", "bfloat16"), AdapterSettings(attention_rank=2, tune_biases=True)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load("nf4", "bfloat16"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        model.train()(ids, labels=ids)


# Files


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        AdapterSettings(tune_biases=True),
        AdapterSettings(
            attention_rank=2, mlp_rank=2, expert_rank=2, tune_biases=True, tune_norms=True, tune_router=True
        ),
        AdapterSettings(attention_rank=2, expert_rank=2, tune_biases=True, selection=SELECTION),
        AdapterSettings(mlp_rank=2, dora=True, tune_biases=True),
    ],
    ids=["alone", "with all else", "some experts", "dora"],
)
def test_stock_peft_loads_trained_biases(
    settings: AdapterSettings,
    load: Callable[..., Any],
    same: Callable[..., None],
    biased_base: Path,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """In experts' stacks, an untrained expert's row is the base's. Both layouts hold the same numbers."""
    model = move(add_adapter(load(), settings))
    expected = model(ids).logits
    save_adapter(model, tmp_path / "saved", fitting_layout(model))
    folder = tmp_path / "saved"
    if fitting_layout(model) == "per_expert":
        folder = tmp_path / "peft"
        convert_adapter(tmp_path / "saved", biased_base, "peft", folder)
    stock, missed = load_stock(biased_base, folder)
    assert not missed
    assert not any(isinstance(module, TrainedBias) for module in stock.modules())
    assert (stock(ids).logits - expected).abs().max() < PARITY
    assert (expected - load()(ids).logits).abs().max() > 0.1

    same(read_adapter(folder).weights(TINY), adapter_weights(model))
    assert torch.equal(load_adapter(load(), folder)(ids).logits, expected)
    if not settings.dora:
        convert_adapter(folder, biased_base, "per_expert", tmp_path / "authors")
        same(read_adapter(tmp_path / "authors").weights(TINY), adapter_weights(model))
        convert_adapter(tmp_path / "authors", biased_base, "peft", tmp_path / "back")
        assert (tmp_path / "back" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()


def test_per_expert_biases_have_the_authors_names(make_weights: Callable[..., AdapterWeights], tmp_path: Path) -> None:
    """The names are those of the biases of Conv1D modules in their PEFT: inside the wrapper, if there is one."""
    write_adapter(make_weights(biases=True, c_attn=(2, 4.0), up=(2, 4.0)), tmp_path / "adapter", "per_expert")
    keys = {key.removeprefix("base_model.model.") for key in read_adapter(tmp_path / "adapter").entries}
    wanted = ("h.1.moe.experts.3.c_fc.base_layer", "h.1.moe.experts.3.c_proj", "h.0.attn.c_attn.base_layer")
    assert {f"transformer.{module}.bias" for module in (*wanted, "h.0.attn.c_proj", "ln_f")} <= keys
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == "all"


def test_biases_that_stock_peft_trained_are_read(
    biased_base: Path, load: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    """Stock PEFT trains no expert's biases. All biases that it trained are used."""
    native = AutoModelForCausalLM.from_pretrained(biased_base, dtype=torch.float32)
    stock = move(peft.get_peft_model(native, peft.LoraConfig(r=2, target_modules=["attn.c_attn"], bias="all")))
    stock.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load(), tmp_path / "adapter")
    assert (model(ids).logits - stock(ids).logits).abs().max() < PARITY
    assert len(adapter_weights(model).biases()) == 4 * 4 + 2 * 2 + 1


@pytest.mark.parametrize("layout", ["peft", "per_expert"])
@pytest.mark.parametrize("lost", ["h.0.attn.c_proj", "h.3.moe.experts"])
def test_a_missing_bias_is_named(
    layout: str, lost: str, make_weights: Callable[..., AdapterWeights], fresh: Callable[..., Any], tmp_path: Path
) -> None:
    file = write_adapter(make_weights(biases=True, c_attn=(2, 4.0)), tmp_path / "adapter", layout) / WEIGHTS_FILE
    metadata = {name: text for name, text in read_adapter(file.parent).metadata.items() if name != CHECKSUMS_KEY}
    state = load_file(file)
    del state[next(key for key in sorted(state) if lost in key and key.endswith("bias"))]
    save_file(state, file, metadata=metadata)
    with pytest.raises(AdapterError, match=rf"transformer\.{lost}.*: .*biases"):
        load_adapter(fresh(), file.parent)


def test_biases_that_do_not_fit_are_refused(
    make_weights: Callable[..., AdapterWeights], fresh: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_adapter(make_weights(biases=True, c_attn=(2, 4.0)), tmp_path / "adapter", "peft")
    stored = read_adapter(folder)
    with pytest.raises(
        AdapterError, match=r"experts\.down_proj_bias: holds \[4, 64\], not a row for each of 8 experts"
    ):
        stored.weights(architecture_of(tiny_config(num_experts=8)))
    state = load_file(folder / WEIGHTS_FILE)
    save_file(state | {"base_model.model.transformer.wte.bias": torch.zeros(3)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"1 adapter tensors? .*wte\.bias"):
        load_adapter(fresh(), folder)
    save_file(state, folder / WEIGHTS_FILE, metadata=stored.metadata)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    with pytest.raises(AdapterError, match="disagree on whether biases are trained"):
        load_adapter(fresh(), folder)


def test_a_stack_needs_every_row(make_weights: Callable[..., AdapterWeights], tmp_path: Path) -> None:
    """Stock PEFT loads a layer's biases as one tensor, so a file without the base's rows would change the others."""
    weights = make_weights(biases=True)
    del weights.trained["transformer.h.1.moe.experts.2.c_fc.bias"]
    with pytest.raises(AdapterError, match=r"h\.1\.moe\.experts\.2\.c_fc\.bias: the layout peft holds .* one stack"):
        write_adapter(weights, tmp_path / "adapter", "peft")


# Several adapters


@pytest.mark.slow
def test_adapters_of_one_model_keep_their_own_biases(load: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    """Adapters with biases of all or some experts, with norms, and without biases give the same as by themselves."""
    kinds = {
        "biases": AdapterSettings(attention_rank=2, tune_biases=True),
        "norms": AdapterSettings(expert_rank=2, tune_norms=True, tune_biases=True),
        "some": AdapterSettings(expert_rank=2, tune_biases=True, selection=SELECTION),
        "plain": AdapterSettings(mlp_rank=2, expert_rank=2),
    }
    alone = {}
    for seed, (name, settings) in enumerate(kinds.items()):
        single = move(add_adapter(load(), settings), seed)
        save_adapter(single, tmp_path / name, fitting_layout(single))
        alone[name] = single(ids).logits
    model = load()
    base_logits = model(ids).logits
    for name in kinds:
        model = load_adapter(model, tmp_path / name, name=name)
        assert torch.equal(model(ids).logits, alone[name]), name
    for name in reversed(kinds):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, alone[name]), name
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base_logits)
        save_adapter(model, tmp_path / "again", fitting_layout(model))
        assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (tmp_path / name / WEIGHTS_FILE).read_bytes(), name
    with pytest.raises(AdapterError, match="'biases' holds fully trained weights"):
        combine_adapters(model, {"biases": 1.0, "plain": 1.0}, "both")
    model.delete_adapter("biases")
    model.set_adapter("norms")
    assert torch.equal(model(ids).logits, alone["norms"])


def test_dora_adds_the_trained_bias(load: Callable[..., Any]) -> None:
    model = move(add_adapter(load("nf4"), AdapterSettings(mlp_rank=2, dora=True, tune_biases=True)))
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    bias = layer.base_layer.parametrizations.bias[0].trained_bias["default"]
    assert_close(layer(torch.zeros(1, D))[0], bias, atol=1e-6, rtol=0)
