"""Loading of a base in 4 bit: the weights that are quantised, their sources, and errors for dense matrices."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lola_ft import load_base
from lola_ft.errors import CheckpointError, UserError
from lola_ft.families import Place, architecture_of
from lola_ft.model import LolaForCausalLM
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts, NF4Linear
from lola_ft.quantization import experts as experts_module
from lola_ft.quantization import load as load_module
from lola_ft.quantization import nf4 as nf4_module
from lola_ft.quantization.audit import require_quantized

BaseWriter = Callable[..., Path]
IDS = torch.randint(6, 320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(base: Path) -> LolaForCausalLM:
    """The base in 4 bit, with all other weights in float32; do not change it."""
    return load_base(base, dtype="float32", quiet=True)


def hub_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dequantised(model: LolaForCausalLM, hub_name: str, dtype: torch.dtype) -> Tensor | None:
    """Return the dequantised weight of a Hub tensor in the Hub's orientation; None if it is not in 4 bit."""
    place = architecture_of(model.config).places[hub_name]
    module = model.get_submodule(place.module)
    if isinstance(module, NF4Experts) and not place.leaf.endswith("_bias"):
        return module.expert_weight(place.leaf, place.expert or 0, dtype)
    if isinstance(module, NF4Linear) and place.leaf == "weight":
        return module.dense_weight(dtype).t()
    return None


def through_bitsandbytes(weight: Tensor) -> Tensor:
    """Quantise and dequantise a weight with bitsandbytes itself."""
    packed, state = bnb.functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return bnb.functional.dequantize_4bit(packed, state)


def dense_twin(model: LolaForCausalLM, base: Path) -> LolaForCausalLM:
    """Return the same base as a dense model with the dequantised values of the 4-bit model."""
    twin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name in hub_tensors(base):
            weight = dequantised(model, name, torch.float32)
            if weight is not None:
                place = architecture_of(model.config).places[name]
                target = parameters[place.parameter]
                target = target if place.expert is None else target[place.expert]
                target.copy_(weight.t() if place.transposed else weight)
    return twin.eval()


SOURCES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "sharded": {"shard": "100KB"},
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_weight_is_quantised_as_bitsandbytes_would(source: str, write_base: BaseWriter) -> None:
    """Weights are quantised from the stored dtype: each expert separately and in×out, attention and MLP out×in."""
    folder = write_base(**SOURCES[source])
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (source == "sharded")
    loaded = load_base(folder, dtype="float32", quiet=True)
    quantised, tensors = 0, hub_tensors(folder)
    for name, tensor in tensors.items():
        actual = dequantised(loaded, name, tensor.dtype)
        place = architecture_of(loaded.config).places[name]
        if actual is not None:
            quantised += 1
            turned = through_bitsandbytes(tensor.t()).t() if place.transposed else through_bitsandbytes(tensor)
            assert torch.equal(actual, turned), name
            continue
        parameter = loaded.get_parameter(place.parameter)
        parameter = parameter if place.expert is None else parameter[place.expert]
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensor.float()), name
    # Two attention weights per layer, two MLP weights in 2 layers, two weights of 4 experts in 2 layers.
    assert quantised == 4 * 2 + 2 * 2 + 2 * 4 * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_matrices_are_4_bit_and_all_else_has_the_wanted_dtype(dtype: str, base: Path) -> None:
    loaded = load_base(base, dtype=dtype, quiet=True)
    wanted = getattr(torch, dtype)
    assert loaded.dtype == wanted
    assert loaded.config.dtype == wanted
    for name, parameter in loaded.named_parameters():
        is_4bit = parameter.dtype == torch.uint8
        is_linear = name.endswith(".weight") and (".attn.c_" in name or ".mlp.c_" in name)
        assert is_4bit == (is_linear or name.endswith((".up_proj", ".down_proj"))), name
        assert is_4bit or parameter.dtype == wanted, name
        assert not parameter.requires_grad
        assert not parameter.is_meta
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert type(loaded.lm_head) is nn.Linear
    assert not loaded.training
    with torch.no_grad():
        assert torch.isfinite(loaded(IDS).logits).all()


@pytest.mark.parametrize("sizes", [{}, {"n_embd": 96, "n_inner": 160}, {"n_embd": 32, "n_inner": 100}], ids=str)
def test_the_model_computes_what_a_dense_one_of_the_same_values_does(
    sizes: dict[str, int], write_base: BaseWriter
) -> None:
    folder = write_base(**sizes)
    loaded = load_base(folder, dtype="float32", quiet=True)
    twin = dense_twin(loaded, folder)
    outputs = []
    for one in (loaded, twin):
        embeds = one.transformer.wte(IDS).detach().requires_grad_()
        output = one(inputs_embeds=embeds, labels=IDS, output_router_logits=True)
        outputs.append((output.logits.detach(), *torch.autograd.grad(output.loss, embeds)))
    for got, wanted in zip(*outputs, strict=True):
        # Float32 sums have another order (a row-major weight against a transposed one), over 4 layers.
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_four_bit_stays_near_the_dense_model(model: LolaForCausalLM, base: Path) -> None:
    dense = load_base(base, quantization=None, dtype="float32", quiet=True)
    with torch.no_grad():
        quantised, full = model(IDS).logits, dense(IDS).logits
    # 4-bit weights have an error of a tenth of their size, through 4 layers. Unrelated logits have similarity 0.
    assert nn.functional.cosine_similarity(quantised.flatten(), full.flatten(), dim=0) > 0.9
    assert not torch.equal(quantised, full)


@pytest.mark.parametrize("quantization", [None, "none"])
@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_loading_without_quantisation_equals_from_pretrained(
    quantization: str | None, dtype: str | torch.dtype, base: Path
) -> None:
    loaded = load_base(base, quantization=quantization, dtype=dtype, quiet=True)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
    actual = loaded.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert type(loaded) is LolaForCausalLM
    assert not loaded.training


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization": "int8"}, "quantization 'int8' is not known; use 'nf4' or None"),
        ({"quantization": "NF4"}, "quantization 'NF4' is not known"),
        ({"dtype": "float8"}, "dtype 'float8' is not known; use one of bfloat16, float16, float32"),
        ({"dtype": torch.int8}, "dtype 'torch.int8' is not known"),
        ({"dtype": torch.float64}, "dtype 'torch.float64' is not known"),
    ],
)
def test_an_unknown_setting_is_a_user_error(change: dict[str, Any], words: str, base: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_base(base, **change)
    assert words in str(caught.value)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_broken_base_is_one_message(quantization: str | None, write_base: BaseWriter) -> None:
    folder = write_base()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: tensor 'transformer\."):
        load_base(folder, quantization=quantization, quiet=True)


def test_generation_settings_are_loaded(write_base: BaseWriter) -> None:
    folder = write_base()
    for quantization in ("nf4", None):
        loaded = load_base(folder, quantization=quantization, quiet=True)
        assert loaded.generation_config.repetition_penalty == 1.25
        assert loaded.generation_config.eos_token_id == 5
    (folder / "generation_config.json").unlink()
    without = load_base(folder, quiet=True)
    assert without.generation_config.eos_token_id == 5  # from config.json


def test_four_bit_generation_runs_and_stops(model: LolaForCausalLM) -> None:
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "repetition_penalty": 1.0}
    cached, plain = (
        model.generate(IDS[:1, :8], max_new_tokens=12, use_cache=use, eos_token_id=None, **options)
        for use in (True, False)
    )
    assert cached.tolist() == plain.tolist()
    end = int(cached[0, 10])
    stopped = model.generate(IDS[:1, :8], max_new_tokens=12, eos_token_id=end, **options)
    assert stopped[0, -1] == end
    assert stopped.shape[1] <= 11


def test_the_fingerprint_does_not_depend_on_quantisation(base: Path, model: LolaForCausalLM) -> None:
    dense = load_base(base, quantization=None, quiet=True)
    assert model.base_fingerprint == dense.base_fingerprint
    assert model.base_id == ""  # a local path means nothing on other machines


def test_small_tiles_change_no_logit_or_gradient(model: LolaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of a float32 sum differs."""

    def run() -> tuple[Tensor, Tensor]:
        embeds = model.transformer.wte(IDS).detach().requires_grad_()
        logits = model(inputs_embeds=embeds).logits
        logits.square().mean().backward()
        return logits.detach(), embeds.grad

    model.float()
    expected = run()
    monkeypatch.setattr(nf4_module, "_TILE", 1024)
    for actual, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_experts", [4, 16])
def test_one_token_dequantises_only_the_experts_it_hits(
    num_experts: int, write_base: BaseWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_base(write_base(num_experts=num_experts), dtype="float32", quiet=True)
    with torch.no_grad():
        cache = loaded(IDS[:1], use_cache=True).past_key_values
    calls = []
    real = experts_module.tiles_of
    monkeypatch.setattr(experts_module, "tiles_of", lambda *args: (calls.append(1), real(*args))[1])
    with torch.no_grad():
        loaded(IDS[:1, :1], past_key_values=cache)
    assert len(calls) == 2 * 2  # two projections in each of 2 MoE layers


def test_a_four_bit_base_is_not_saved_as_a_checkpoint(model: LolaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not saved as a checkpoint"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copied_model_is_equal_and_independent(model: LolaForCausalLM) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(twin(IDS).logits, before)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(IDS).logits, before)
    assert twin.lm_head.weight is twin.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_model_keeps_its_results(dtype: torch.dtype, model: LolaForCausalLM, base: Path) -> None:
    """The model equals one that was loaded in this dtype, because the scales stay float32."""
    cast = copy.deepcopy(model).to(dtype)
    loaded = load_base(base, dtype=dtype, quiet=True)
    with torch.no_grad():
        assert torch.equal(cast(IDS).logits, loaded(IDS).logits)


def test_training_after_evaluation_gives_the_same_gradients(base: Path) -> None:
    loaded = load_base(base, dtype="float32", quiet=True)

    def gradient() -> Tensor:
        embeds = loaded.transformer.wte(IDS).detach().requires_grad_()
        return torch.autograd.grad(loaded(inputs_embeds=embeds, labels=IDS).loss, embeds)[0]

    names = list(hub_tensors(base))
    before, weights = gradient(), [dequantised(loaded, name, torch.float32) for name in names]
    loaded.eval()
    with torch.no_grad():
        loaded(IDS)
    loaded.generate(IDS[:1, :8], max_new_tokens=4)
    assert torch.equal(gradient(), before)
    loaded.train()
    assert torch.equal(gradient(), before)
    for name, weight in zip(names, weights, strict=True):
        after = dequantised(loaded, name, torch.float32)
        assert (after is None) == (weight is None)
        assert weight is None or torch.equal(after, weight), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_backward_keeps_is_far_below_the_dense_weights(
    checkpointing: bool, write_base: BaseWriter, saved_bytes: Any
) -> None:
    loaded = load_base(write_base(n_embd=256, n_inner=1024, vocab_size=64), dtype="float32", quiet=True).train()
    if checkpointing:
        loaded.gradient_checkpointing_enable()
    ids = torch.tensor([[7, 8, 9, 10]])
    embeds = loaded.transformer.wte(ids).detach().requires_grad_()
    with saved_bytes(embeds, *loaded.parameters(), *loaded.buffers()) as saved:
        loss = loaded(inputs_embeds=embeds, labels=ids).loss
    saved.add_contexts(loss)
    dense = 4 * (4 * 4 * 256 * 256 + 2 * 5 * 2 * 256 * 1024)  # attention, and 2 dense MLPs + 2 x 4 experts
    assert 0 < saved.total < dense / (500 if checkpointing else 20)
    loss.backward()
    assert embeds.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in loaded.parameters())


def test_a_dense_expert_is_refused(base: Path) -> None:
    loaded = load_base(base, dtype="float32", quiet=True)
    require_quantized(loaded)
    loaded.transformer.h[3].moe.experts = FusedExperts(64, 128, 4)
    with pytest.raises(CheckpointError, match=r"2 weights are still dense .* transformer\.h\.3\.moe\.experts\.up_proj"):
        require_quantized(loaded)


@pytest.mark.parametrize("name", ["transformer.h.1.attn.c_proj", "transformer.h.2.mlp.c_fc"])
def test_a_dense_linear_layer_is_refused(name: str, base: Path) -> None:
    loaded = load_base(base, dtype="float32", quiet=True)
    parent, _, leaf = name.rpartition(".")
    setattr(loaded.get_submodule(parent), leaf, nn.Linear(64, 64))
    with pytest.raises(CheckpointError, match=f"1 weights are still dense after 4-bit loading: {name}.weight"):
        require_quantized(loaded)


@pytest.mark.parametrize("forgotten", [FusedExperts, nn.Linear])
def test_a_layer_without_weights_is_an_error(
    forgotten: type[nn.Module], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load_module._quantize_module
    name = "transformer.h.1." + ("moe.experts" if forgotten is FusedExperts else "attn.c_attn")

    def forget(model: LolaForCausalLM, place: Place, device: torch.device) -> None:
        if place.module != name:
            real(model, place, device)

    monkeypatch.setattr(load_module, "_quantize_module", forget)
    with pytest.raises(CheckpointError, match=r"still dense after 4-bit loading: transformer\.h\.1\."):
        load_base(base, quiet=True)


def test_old_configs_and_legacy_tensors_change_nothing(base: Path, write_base: BaseWriter) -> None:
    """4-bit loading reads the files itself, including tensors that from_pretrained would leave out."""
    folder = write_base()
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_lola_gpt2.LOLALMHeadModel"}
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu_fast", "auto_map": auto_map}))
    model_file = folder / "model.safetensors"
    tensors = load_file(model_file)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(tensors, model_file)
    with torch.no_grad():
        actual, expected = (load_base(path, dtype="float32", quiet=True)(IDS).logits for path in (folder, base))
    assert torch.equal(actual, expected)
