"""The numbers of a merge, recomputed here from only the files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lola_ft.adapters import load_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError
from lola_ft.merging import merge
from lola_ft.quantization import load_base

# Float32: one merged weight against base and side path. The limit that merges must meet is 1e-4.
ROUNDING = 1e-5

State = dict[str, Tensor]


def exact_merge(base: State, weights: AdapterWeights) -> State:
    """Return the merged weights in float64, by the formula (LoRA, arXiv 2106.09685). Hub weights are in×out."""
    merged = {name: tensor.double() for name, tensor in base.items()}
    for module, pair in weights.pairs.items():
        merged[f"{module}.weight"] += (pair.alpha / pair.rank * (pair.b.double() @ pair.a.double())).t()
    return merged | {name: tensor.double() for name, tensor in weights.trained.items()}


def test_a_merge_gives_the_logits_of_the_authors_merge(golden_folder: Path, golden: State, tmp_path: Path) -> None:
    base, adapter = golden_folder / "base", golden_folder / "adapter"
    report = merge(base, adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    batch = {"input_ids": golden["input_ids"], "attention_mask": golden["attention_mask"]}
    logits = model(**batch).logits
    real = golden["attention_mask"].bool()
    assert (logits - golden["merged.logits"])[real].abs().max() < 1e-4
    adapted = load_adapter(load_base(base, None, "float32", quiet=True), adapter)(**batch).logits
    assert (logits - adapted).abs().max() < ROUNDING

    stored = load_file(adapter / "adapter_model.safetensors")
    assert report.applied == report.adapter_tensors == len(stored) == 56
    assert report.changed == len(stored) // 2
    assert report.verification is not None
    assert report.verification.max_logit_difference < ROUNDING
    assert report.verification.top1_agreement == 1.0


@pytest.mark.parametrize("layout", ["peft", "per_expert"])
def test_every_weight_is_base_plus_update_and_counted(
    layout: str,
    weights: AdapterWeights,
    store: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    read_state: Callable[[Path], State],
) -> None:
    report = merge(tiny_base, store(weights, layout=layout), tmp_path / "merged", check=False)
    base, merged = read_state(tiny_base), read_state(tmp_path / "merged")
    exact = exact_merge(base, weights)
    assert merged.keys() == base.keys()
    touched = {f"{module}.weight" for module in weights.pairs} | set(weights.trained)
    largest = 0.0
    for name, tensor in merged.items():
        assert tensor.dtype == base[name].dtype == torch.float32
        if name in weights.trained:
            assert torch.equal(tensor, weights.trained[name])
        elif name in touched:
            # float32 sums of up to seven products and one addition lose a few units in the last place
            assert_close(tensor.double(), exact[name], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(tensor, base[name]), name
        largest = max(largest, (tensor - base[name]).abs().max().item())

    # 4 layers' attention, 2 dense MLPs, 2 * 4 experts, two projections each; A and B; two routers.
    assert report.applied == report.adapter_tensors == 2 * (8 + 4 + 16) + 2
    assert report.changed == len(touched) == 30
    assert report.copied == len(base) - len(touched)
    assert report.rounded == 0
    assert report.largest_change == pytest.approx(largest, abs=1e-6)
    assert report.adapter_layout == layout
    assert report.verification is None


def test_rslora_scales_by_the_root_of_the_rank(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    weights.rslora = True
    merge(tiny_base, store(weights), tmp_path / "merged", check=False)
    name = "transformer.h.1.moe.experts.2.c_proj"
    pair = weights.pairs[name]
    base = load_file(tiny_base / "model.safetensors")[f"{name}.weight"]
    delta = pair.alpha / pair.rank**0.5 * (pair.b.double() @ pair.a.double()).t()
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert_close(merged.double(), base.double() + delta, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_rounded_once(
    dtype: torch.dtype,
    weights: AdapterWeights,
    adapter: Path,
    copy_base: Callable[..., Path],
    tmp_path: Path,
    read_state: Callable[[Path], State],
) -> None:
    base_folder = copy_base("base16", dtype)
    merge(base_folder, adapter, tmp_path / "merged", check=False)
    base, merged = read_state(base_folder), read_state(tmp_path / "merged")
    exact = exact_merge(base, weights)
    half_unit = torch.finfo(dtype).eps / 2
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        if f"{name.removesuffix('.weight')}" not in weights.pairs:
            assert torch.equal(tensor, exact[name].to(dtype)), name
            continue
        # One rounding costs half a unit in the last place. Rounding the update separately would cost more.
        error = (tensor.double() - exact[name]).abs()
        assert (error <= half_unit * 1.001 * exact[name].abs() + 1e-7).all(), name
        # Rarely, a float32 sum is on the other side of a tie between two 16-bit values.
        assert (tensor == exact[name].to(dtype)).double().mean() > 0.999, name


@pytest.mark.parametrize(
    ("stored", "option", "written"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_each_dtype_option_writes_its_dtype(
    stored: str,
    option: str,
    written: str,
    adapter: Path,
    copy_base: Callable[..., Path],
    tmp_path: Path,
    read_state: Callable[[Path], State],
) -> None:
    base = copy_base("base", getattr(torch, stored))
    merge(base, adapter, tmp_path / "merged", dtype=option, check=False)
    dtype = getattr(torch, written)
    merged = read_state(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert torch.equal(merged["transformer.wte.weight"], read_state(base)["transformer.wte.weight"].to(dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == dtype


@pytest.mark.slow
def test_rounding_nf4_is_the_adapter_on_the_4_bit_base(
    weights: AdapterWeights,
    adapter: Path,
    copy_base: Callable[..., Path],
    ids: Tensor,
    tmp_path: Path,
    read_state: Callable[[Path], State],
) -> None:
    base = copy_base("base", torch.bfloat16)  # rounded to 4 bit from the stored values, as in loading
    report = merge(base, adapter, tmp_path / "nf4", dtype="float32", rounding="nf4")
    merge(base, adapter, tmp_path / "plain", dtype="float32", check=False)
    adapted = load_adapter(load_base(base, "nf4", "float32", quiet=True), adapter)(ids).logits
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4").eval()(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()(ids).logits
    assert_close(logits, adapted, atol=ROUNDING, rtol=0)
    assert (plain - adapted).abs().max() > 0.01
    assert (report.changed, report.rounded) == (30, 0)
    assert report.verification is not None
    assert report.verification.max_logit_difference < ROUNDING

    # Weights that 4-bit loading keeps dense do not change: embeddings, norms, biases.
    state, merged = read_state(base), read_state(tmp_path / "nf4")
    for name in state:
        if f"{name.removesuffix('.weight')}" not in weights.pairs and name not in weights.trained:
            assert torch.equal(merged[name], state[name].float()), name


def test_rounding_nf4_counts_the_weights_that_only_rounding_changed(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    weights.pairs = {module: pair for module, pair in weights.pairs.items() if ".attn." in module}
    weights.trained = {}
    report = merge(tiny_base, store(weights), tmp_path / "merged", rounding="nf4", check="weights")
    assert (report.changed, report.rounded) == (8, 4 + 16)
    base = load_file(tiny_base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    differ = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(differ) == report.changed + report.rounded
    assert report.copied == len(base) - len(differ)

    loaded = load_base(tiny_base, "nf4", "float32", quiet=True)
    experts = loaded.get_submodule("transformer.h.1.moe.experts")
    rounded = experts.expert_weight("up_proj", 2, torch.float32)
    assert torch.equal(merged["transformer.h.1.moe.experts.2.c_fc.weight"], rounded)


# A merge that would do nothing, or something else


def test_an_adapter_that_changes_nothing_is_refused(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    for pair in weights.pairs.values():
        pair.b.zero_()
    weights.trained = {}
    for rounding in ("base", "nf4"):
        with pytest.raises(AdapterError, match="changes nothing"):
            merge(tiny_base, store(weights), tmp_path / "merged", rounding=rounding)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_update_below_16_bit_rounding_is_refused_as_no_change(
    weights: AdapterWeights, store: Callable[..., Path], copy_base: Callable[..., Path], tmp_path: Path
) -> None:
    """There is an update, but bfloat16 rounds every merged weight back to the base's."""
    weights.pairs = {module: pair for module, pair in weights.pairs.items() if ".attn.c_attn" in module}
    weights.trained = {}
    for pair in weights.pairs.values():
        pair.b.mul_(3e-9)
    base = copy_base("base", torch.bfloat16)
    with pytest.raises(AdapterError, match="too small for the output dtype"):
        merge(base, store(weights), tmp_path / "merged")
    merge(base, store(weights), tmp_path / "merged", dtype="float32", check=False)


def test_a_router_equal_to_the_bases_is_refused_as_no_change(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    base = load_file(tiny_base / "model.safetensors")
    weights.pairs = {}
    weights.trained = {name: base[name] for name in weights.trained}
    with pytest.raises(AdapterError, match="changes nothing"):
        merge(tiny_base, store(weights), tmp_path / "merged")


def test_an_adapter_of_only_a_router_is_merged(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    weights.pairs = {}
    report = merge(tiny_base, store(weights), tmp_path / "merged", check="weights")
    assert (report.applied, report.changed) == (2, 2)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in weights.trained.items())


def test_a_module_that_the_base_does_not_have_is_refused(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    weights.pairs["transformer.h.0.moe.experts.0.c_fc"] = weights.pairs.pop("transformer.h.1.moe.experts.0.c_fc")
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.moe\.experts\.0\.c_fc: .*base"):
        merge(tiny_base, store(weights, layout="per_expert"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_unless_allowed(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    weights.base_fingerprint = "feedfacefeedface"
    with pytest.raises(AdapterError, match=r"base feedfacefeedface.* [0-9a-f]{16}.*--allow-other-base"):
        merge(tiny_base, store(weights), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    report = merge(tiny_base, store(weights), tmp_path / "merged", allow_other_base=True, check="weights")
    assert report.base_fingerprint != "feedfacefeedface"


def test_the_16_bit_copy_of_the_base_is_the_same_base(
    weights: AdapterWeights, store: Callable[..., Path], tiny_base: Path, copy_base: Callable[..., Path], tmp_path: Path
) -> None:
    own: Any = load_base(tiny_base, None, "float32", quiet=True)
    weights.base_fingerprint = own.base_fingerprint
    merge(copy_base("base16", torch.bfloat16), store(weights), tmp_path / "merged", check=False)
    shutil.rmtree(tmp_path / "merged")
    merge(tiny_base, store(weights), tmp_path / "merged", check=False)
