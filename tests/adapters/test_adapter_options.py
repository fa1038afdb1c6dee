"""Options of an adapter: settings per group, selected experts, router, norms, DoRA, LoftQ, several adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from lola_ft.adapters import AdapterSettings, add_adapter, load_adapter, lora_config, save_adapter
from lola_ft.adapters.combine import combine_adapters
from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.expert_lora import ParamWrapper
from lola_ft.adapters.load_save import adapter_weights
from lola_ft.adapters.loftq import start_at_rounding_error
from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.adapters.peft_model import RouterLora
from lola_ft.adapters.selection import read_selection
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import AdapterError, UserError
from tests.tiny import TINY

ROUNDING = 1e-5  # float32 sums have another order
D, F, E = 64, 128, 4  # sizes of the tiny base, which has MoE layers 1 and 3
SELECTION = ((0, 2), (3,))


def randomize(model: peft.PeftModel, adapter: str = "default", seed: int = 0) -> peft.PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def gradients(model: peft.PeftModel, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# Groups with their own settings


def test_each_group_has_its_own_alpha_and_dropout(fresh: Callable[..., Any], tmp_path: Path, ids: Tensor) -> None:
    settings = AdapterSettings(
        attention_rank=4,
        mlp_rank=2,
        expert_rank=2,
        router_rank=2,
        alpha=8.0,
        dropout=0.1,
        alphas={"mlp": 6.0, "experts": 3.0},
        dropouts={"attention": 0.0, "experts": 0.3},
    )
    model = randomize(add_adapter(fresh(), settings))
    layers = model.base_model.model.transformer.h
    scaling = {
        "attention": layers[0].attn.c_attn.scaling["default"],
        "mlp": layers[0].mlp.c_fc.scaling["default"],
        "experts": layers[1].moe.experts.scaling["default"],
        "router": layers[1].moe.gate.scaling["default"],
    }
    assert scaling == {"attention": 2.0, "mlp": 3.0, "experts": 1.5, "router": 4.0}
    assert isinstance(layers[0].attn.c_attn.lora_dropout["default"], torch.nn.Identity)
    assert layers[0].mlp.c_fc.lora_dropout["default"].p == 0.1
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert [module.dropout_of["default"] for module in wrappers] == [0.3] * 4
    expected = model.eval()(ids).logits
    save_adapter(model, tmp_path / "adapter")
    assert_close(load_adapter(fresh(), tmp_path / "adapter")(ids).logits, expected, atol=ROUNDING, rtol=0)


def test_a_is_normal_with_gaussian_init(fresh: Callable[..., Any]) -> None:
    model = add_adapter(fresh(), AdapterSettings(attention_rank=8, expert_rank=8, init="gaussian"))
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            assert parameter.std().item() == pytest.approx(1 / 8, rel=0.15), name
        elif ".lora_B." in name:
            assert not parameter.any()


@pytest.mark.parametrize("rank", [1, 3, 5, 7])
def test_an_adapter_of_any_rank_survives_the_file(
    rank: int, fresh: Callable[..., Any], tmp_path: Path, ids: Tensor
) -> None:
    model = randomize(add_adapter(fresh(), AdapterSettings(attention_rank=rank, expert_rank=rank))).eval()
    save_adapter(model, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert shapes["base_model.model.transformer.h.1.moe.experts.lora_A.weight"] == [E * rank, F]
    assert_close(load_adapter(fresh(), tmp_path / "adapter")(ids).logits, model(ids).logits, atol=ROUNDING, rtol=0)


# Some experts


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_only_selected_experts_hold_tensors_and_learn(
    quantization: str | None, fresh: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    """Outputs and gradients equal those of an adapter on all experts that is zero for the others."""
    torch.manual_seed(1)  # LoRA's start decides which experts the tokens reach
    few = add_adapter(fresh(quantization), AdapterSettings(expert_rank=2, selection=SELECTION))
    assert sum(p.numel() for p in few.parameters() if p.requires_grad) == 3 * 2 * 2 * (D + F)
    randomize(few).train()
    write_adapter(adapter_weights(few), tmp_path / "padded", "peft")
    with safe_open(tmp_path / "padded" / "adapter_model.safetensors", "pt") as file:
        padded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    every = add_adapter(fresh(quantization), AdapterSettings(expert_rank=2)).train()
    peft.set_peft_model_state_dict(every, padded)
    assert_close(few(ids).logits, every(ids).logits, atol=ROUNDING, rtol=0)
    theirs = gradients(every, ids)
    for name, grad in gradients(few, ids).items():
        layer = 0 if ".h.1." in name else 1
        kept = list(SELECTION[layer])
        if "lora_A" in name:
            expected = theirs[name].view(E, 2, -1)[kept].flatten(0, 1)
        else:
            expected = theirs[name].view(len(grad), 2, E)[..., kept].flatten(1)
        assert grad.abs().max() > 0, name
        assert_close(grad, expected, atol=ROUNDING, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_layer_without_a_selected_expert_gets_no_lora(fresh: Callable[..., Any], ids: Tensor) -> None:
    model = add_adapter(fresh(), AdapterSettings(expert_rank=2, selection=((), (1,))))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    assert all(".h.3." in name for name in wrapped)
    assert len(wrapped) == 2
    assert set(gradients(model.train(), ids)) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layout", ["peft", "per_expert"])
def test_a_selection_survives_the_file(
    layout: str, fresh: Callable[..., Any], ids: Tensor, tmp_path: Path, same: Callable[..., None]
) -> None:
    model = randomize(add_adapter(fresh(), AdapterSettings(expert_rank=2, selection=SELECTION))).eval()
    save_adapter(model, tmp_path / "adapter", layout)
    stored = read_adapter(tmp_path / "adapter")
    same(stored.weights(TINY), adapter_weights(model))
    again = load_adapter(fresh(), tmp_path / "adapter")
    assert [m.experts_of["default"] for m in again.modules() if isinstance(m, ParamWrapper)] == [(0, 2)] * 2 + [
        (3,)
    ] * 2
    assert_close(again(ids).logits, model(ids).logits, atol=ROUNDING, rtol=0)
    if layout == "per_expert":
        experts = {key.split(".moe.experts.")[1].split(".")[0] for key in stored.entries if ".h.1." in key}
        assert experts == {"0", "2"}


def test_conversion_of_a_selection_loses_nothing(fresh: Callable[..., Any], tiny_base: Path, tmp_path: Path) -> None:
    model = randomize(add_adapter(fresh(), AdapterSettings(expert_rank=2, selection=SELECTION)))
    save_adapter(model, tmp_path / "a", "per_expert")
    convert_adapter(tmp_path / "a", tiny_base, "peft", tmp_path / "b")
    convert_adapter(tmp_path / "b", tiny_base, "per_expert", tmp_path / "c")
    first, last = (read_adapter(tmp_path / name) for name in "ac")
    assert first.entries.keys() == last.entries.keys()
    assert all(torch.equal(first.entries[key].read(), last.entries[key].read()) for key in first.entries)


def test_a_selection_is_read_from_a_word_lists_or_a_file(tmp_path: Path) -> None:
    assert read_selection("all") is None
    assert read_selection([[2, 0], []]) == ((0, 2), ())
    file = tmp_path / "chosen.json"
    file.write_text(json.dumps({"experts": [[1], [3, 2]], "why": "highest share"}))
    assert read_selection(str(file)) == ((1,), (2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .*No such file"),
        ("{", "not valid JSON"),
        ("[[0]]", "not a JSON file with"),
        ('{"experts": [["a"]]}', "not a JSON file with"),
        ('{"experts": [[true]]}', "not a JSON file with"),
    ],
)
def test_a_bad_selection_file_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "chosen.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"chosen\.json: .*{message}|{message}"):
        read_selection(str(file))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (((0,),), "1 lists, but the base has 2 MoE layers"),
        (((0,), (4,)), "list 1: there is no expert 4; experts are 0 to 3"),
        (((-1,), ()), "list 0: there is no expert -1"),
        (((1, 1), ()), "list 0 names an expert twice"),
        (((), ()), "no expert is named"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(selection: Any, message: str, fresh: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(fresh(), AdapterSettings(expert_rank=2, selection=selection))


# Router and norms


def test_lora_on_the_router_scores_in_float32(fresh: Callable[..., Any], ids: Tensor) -> None:
    model = randomize(add_adapter(fresh(None, "bfloat16"), AdapterSettings(router_rank=4))).eval()
    gate = model.base_model.model.transformer.h[1].moe.gate
    assert isinstance(gate, RouterLora)
    x = torch.randn(9, D).bfloat16()
    a, b = gate.lora_A["default"].weight, gate.lora_B["default"].weight
    expected = x.float() @ gate.base_layer.weight.float().t() + x.float() @ a.t() @ b.t() * gate.scaling["default"]
    with torch.autocast("cpu", torch.bfloat16):
        scores = gate(x)
    assert scores.dtype == torch.float32
    assert_close(scores, expected)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_norms_are_trained_and_stored(
    quantization: str | None, fresh: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    base = fresh(quantization)
    expected = base(ids).logits
    model = add_adapter(base, AdapterSettings(attention_rank=2, tune_norms=True)).eval()
    assert torch.equal(model(ids).logits, expected)
    names = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(names) == 2 * (2 * 4 + 1)
    assert all(".ln_" in name for name in names)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    assert len(read_adapter(tmp_path / "adapter").weights(TINY).trained) == 18
    assert_close(
        load_adapter(fresh(quantization), tmp_path / "adapter")(ids).logits, model(ids).logits, atol=ROUNDING, rtol=0
    )


# DoRA


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_dora_computes_its_formula(quantization: str | None, fresh: Callable[..., Any], ids: Tensor) -> None:
    base = fresh(quantization)
    before = base(ids).logits
    model = add_adapter(base, AdapterSettings(attention_rank=3, mlp_rank=2, expert_rank=2, dora=True)).eval()
    assert_close(model(ids).logits, before, atol=ROUNDING, rtol=0)
    randomize(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    linear = layer.base_layer
    weight = linear.weight if quantization is None else linear.dense_weight(torch.float32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    changed = weight + layer.scaling["default"] * b @ a
    lengths = layer.lora_magnitude_vector["default"].weight
    x = torch.randn(5, D)
    expected = x @ (lengths[:, None] * changed / changed.norm(dim=1, keepdim=True)).t() + linear.bias
    assert_close(layer(x), expected, atol=ROUNDING, rtol=1e-4)
    grads = gradients(model.train(), ids)
    assert len([name for name in grads if "magnitude" in name]) == 4 * 2 + 2 * 2
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_dora_keeps_no_dense_weight_for_backward(fresh: Callable[..., Any]) -> None:
    layer = add_adapter(fresh("nf4"), AdapterSettings(mlp_rank=2, dora=True, dropout=0.5)).train()
    c_fc = layer.base_model.model.transformer.h[0].mlp.c_fc
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        c_fc(torch.randn(7, D, requires_grad=True))
    assert saved
    assert all(tensor.numel() < D * F for tensor in saved)


def test_dora_with_experts_fits_only_the_layout_peft(
    make_weights: Callable[..., AdapterWeights],
    same: Callable[[AdapterWeights, AdapterWeights], None],
    tmp_path: Path,
) -> None:
    """The authors' PEFT makes lengths for all modules with LoRA, or for none."""
    with_experts = make_weights(c_attn=(3, 8.0), up=(2, 8.0), dora=True)
    with pytest.raises(AdapterError, match=r"plain LoRA on others \(.*experts.*\), which the layout per_expert cannot"):
        write_adapter(with_experts, tmp_path / "adapter", "per_expert")
    weights = make_weights(c_attn=(3, 8.0), mlp_down=(2, 8.0), dora=True)
    write_adapter(weights, tmp_path / "authors", "per_expert")
    same(read_adapter(tmp_path / "authors").weights(TINY), weights)
    config = json.loads((tmp_path / "authors" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["fan_in_fan_out"]) == (True, True)
    keys = read_adapter(tmp_path / "authors").entries  # the name in their PEFT (0.11)
    assert "base_model.model.transformer.h.2.mlp.c_proj.lora_magnitude_vector" in keys

    write_adapter(weights, tmp_path / "adapter", "peft")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False}))
    with pytest.raises(AdapterError, match="disagree on whether it uses DoRA"):
        read_adapter(tmp_path / "adapter").weights(TINY)


# LoftQ


def test_loftq_brings_the_4_bit_base_closer_to_the_original(
    fresh: Callable[..., Any], tiny_base: Path, ids: Tensor, tmp_path: Path
) -> None:
    expected = fresh()(ids).logits
    plain = (fresh("nf4")(ids).logits - expected).abs().mean()
    settings = AdapterSettings(attention_rank=16, mlp_rank=16, expert_rank=16, init="loftq", alpha=7.0)
    model = add_adapter(fresh("nf4"), settings).eval()
    sentence = start_at_rounding_error(model, BaseCheckpoint.open(tiny_base))
    corrected = (model(ids).logits - expected).abs().mean()
    assert corrected < 0.8 * plain
    share = float(sentence.split("corrects ")[1].split("%")[0])
    assert 15 < share < 100
    # As the paper says, the first singular values of the error are gone.
    linear = model.base_model.model.transformer.h[0].mlp.c_fc
    weight = BaseCheckpoint.open(tiny_base).entries["transformer.h.0.mlp.c_fc.weight"].read().t()
    error = weight - linear.base_layer.dense_weight(torch.float32)
    update = linear.scaling["default"] * linear.lora_B["default"].weight @ linear.lora_A["default"].weight
    best = torch.linalg.svdvals(error)[16:].norm()
    assert (error - update).norm() < 1.05 * best

    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(load_adapter(fresh("nf4"), tmp_path / "adapter")(ids).logits, model(ids).logits)
    with pytest.raises(AdapterError, match=r"loftq.*quantization='nf4'"):
        load_adapter(fresh(), tmp_path / "adapter")


def test_loftq_without_a_4_bit_base_is_refused(fresh: Callable[..., Any], tiny_base: Path) -> None:
    model = add_adapter(fresh(), AdapterSettings(attention_rank=2))
    with pytest.raises(UserError, match="no weight with LoRA is in 4 bit"):
        start_at_rounding_error(model, BaseCheckpoint.open(tiny_base))


def test_loftq_of_selected_experts_does_not_change_the_others(fresh: Callable[..., Any], tiny_base: Path) -> None:
    model = add_adapter(fresh("nf4"), AdapterSettings(expert_rank=2, selection=SELECTION))
    start_at_rounding_error(model, BaseCheckpoint.open(tiny_base))
    pairs = adapter_weights(model).pairs
    assert {module.split(".experts.")[1].split(".")[0] for module in pairs if ".h.1." in module} == {"0", "2"}
    assert all(pair.b.abs().max() > 0 for pair in pairs.values())


# Several adapters


def test_adapters_of_one_model_do_not_influence_each_other(
    fresh: Callable[..., Any], make_weights: Callable[..., AdapterWeights], ids: Tensor, tmp_path: Path
) -> None:
    """Loaded one after another, switched, disabled or summed by weight, each gives the same as by itself."""
    mixes = {
        "first": make_weights(c_attn=(4, 8.0), up=(2, 8.0), down=(2, 8.0)),
        "second": make_weights(c_attn=(4, 6.0), up=(2, 4.0), down=(2, 3.0)),
    }
    for pair in mixes["second"].pairs.values():
        pair.a.mul_(-0.5)
    alone = {}
    model: Any = fresh()
    base_logits = model(ids).logits
    for name, weights in mixes.items():
        write_adapter(weights, tmp_path / name, "peft")
        alone[name] = load_adapter(fresh(), tmp_path / name)(ids).logits
        model = load_adapter(model, tmp_path / name, name=name)
        assert torch.equal(model(ids).logits, alone[name]), "the one loaded last is active"
    model.set_adapter("first")
    assert torch.equal(model(ids).logits, alone["first"])
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base_logits)

    combine_adapters(model, {"first": 0.75, "second": -1.5}, "both")
    both = adapter_weights(model, "both")
    for module in both.pairs:
        expected = 0.75 * mixes["first"].delta(module) - 1.5 * mixes["second"].delta(module)
        assert_close(both.delta(module), expected, atol=1e-6, rtol=1e-5)
    save_adapter(model, tmp_path / "both")
    assert_close(load_adapter(fresh(), tmp_path / "both")(ids).logits, model(ids).logits, atol=ROUNDING, rtol=0)


def test_adapters_that_cannot_be_combined_are_named(
    fresh: Callable[..., Any], make_weights: Callable[..., AdapterWeights], tmp_path: Path
) -> None:
    write_adapter(make_weights(c_attn=(4, 8.0), router=True), tmp_path / "router", "peft")
    write_adapter(make_weights(c_attn=(4, 8.0)), tmp_path / "plain", "peft")
    model = load_adapter(fresh(), tmp_path / "router", name="router")
    model = load_adapter(model, tmp_path / "plain", name="plain")
    with pytest.raises(AdapterError, match="'router' holds fully trained weights"):
        combine_adapters(model, {"router": 1.0, "plain": 1.0}, "both")
    with pytest.raises(UserError, match="no adapter 'other'; it has router, plain"):
        combine_adapters(model, {"other": 1.0}, "both")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdapterSettings(router_rank=2, tune_router=True), "either tuned or has LoRA"),
        (AdapterSettings(), "Nothing would be trained"),
        (
            AdapterSettings(attention_rank=2, dora=True, router_rank=2),
            "DoRA acts only on attention and mlp, and the router has LoRA",
        ),
        (AdapterSettings(attention_rank=2, init="pisa"), "init 'pisa' is not known; use one of default, gaussian"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: AdapterSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lora_config(settings, TINY)
