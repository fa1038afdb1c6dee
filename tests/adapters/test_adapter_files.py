"""Adapter folders: errors name what is wrong, and writing is all or nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lola_ft.adapters.checksums import CHECKSUMS_KEY
from lola_ft.adapters.declared import declared_modules
from lola_ft.adapters.load_save import adapter_weights, load_adapter
from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError, UserError
from lola_ft.families import architecture_of
from lola_ft.model import LolaConfig
from lola_ft.quantization import load_base
from tests.conftest import assert_says
from tests.tiny import TINY

E = 4


@pytest.fixture
def adapter(everything: AdapterWeights, tmp_path: Path) -> Path:
    """A complete adapter folder, for tests to damage."""
    everything.base, everything.base_fingerprint = "someone/lola", "0123456789abcdef"
    return write_adapter(everything, tmp_path / "adapter", "peft")


def change_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


def refusal(adapter: Path) -> str:
    with pytest.raises(AdapterError) as error:
        read_adapter(adapter).weights(TINY)
    assert str(adapter) in str(error.value)
    return str(error.value)


# Reading


def test_a_missing_folder_or_config_is_named(tmp_path: Path, adapter: Path) -> None:
    assert "no adapter here" in refusal(tmp_path / "nowhere")
    (adapter / "adapter_config.json").unlink()
    assert_says(refusal(adapter), f"{adapter} … adapter_config.json … adapter_model.safetensors")


def test_a_missing_weights_file_is_reported(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "damaged or incomplete" in refusal(adapter)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_weights_file_is_reported(keep: int, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "damaged or incomplete" in refusal(adapter)


@pytest.mark.parametrize("text", ["{", "", '{"peft_type": "LORA"', "\xff\xfe"])
def test_a_damaged_config_is_reported(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "damaged or incomplete" in refusal(adapter)


def test_a_config_that_is_no_object_is_reported(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[1]")
    assert_says(refusal(adapter), "adapter_config.json: … list")


@pytest.mark.parametrize("peft_type", ["LOHA", "PROMPT_TUNING", None])
def test_another_kind_of_adapter_is_refused(peft_type: str | None, adapter: Path) -> None:
    change_config(adapter, peft_type=peft_type)
    assert_says(refusal(adapter), f"peft_type … {peft_type} … LoRA")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_a_setting_that_would_change_the_numbers_is_refused(key: str, value: Any, adapter: Path) -> None:
    change_config(adapter, **{key: value})
    message = refusal(adapter)
    assert f"adapter_config.json: {key} is {value}" in message
    assert "does not support" in message


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_keeps_the_base_is_accepted(
    value: Any, adapter: Path, everything: AdapterWeights, same: Callable[[AdapterWeights, AdapterWeights], None]
) -> None:
    change_config(adapter, init_lora_weights=value)
    same(read_adapter(adapter).weights(TINY), everything)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(value: float, adapter: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.1.moe.experts.lora_B.weight"
    state[key][0, 0] = value
    save_file(state, adapter / "adapter_model.safetensors")
    message = refusal(adapter)
    assert "1 tensors hold NaN or infinite values" in message
    assert key in message


def test_a_later_version_of_the_layout_is_refused(adapter: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    save_file(state, adapter / "adapter_model.safetensors", metadata={"lola_ft_layout": "peft/2"})
    assert_says(refusal(adapter), "layout … 2 … 1")


# Tensors lost, added, or in another order


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and keep the file's metadata."""
    file = adapter / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, metadata=metadata)


C_ATTN = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
DOWN_B = "base_model.model.transformer.h.1.moe.experts.lora_B.weight"


def lose_a_module(state: dict[str, torch.Tensor]) -> None:
    del state[C_ATTN.format(2, "A")], state[C_ATTN.format(2, "B")]


def swap_layers(state: dict[str, torch.Tensor]) -> None:
    one, other = C_ATTN.format(0, "B"), C_ATTN.format(2, "B")
    state[one], state[other] = state[other], state[one]


def put_experts_first(state: dict[str, torch.Tensor]) -> None:
    state[DOWN_B] = state[DOWN_B].view(len(state[DOWN_B]), -1, E).transpose(1, 2).reshape(state[DOWN_B].shape)


def add_a_layer(state: dict[str, torch.Tensor]) -> None:
    for factor in "AB":
        state[C_ATTN.format(4, factor)] = state[C_ATTN.format(0, factor)].clone()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lose_a_module, f"2 tensors are missing: {C_ATTN.format(2, 'A')}, {C_ATTN.format(2, 'B')}"),
        (add_a_layer, f"2 tensors were not in the adapter when it was written: {C_ATTN.format(4, 'A')}"),
        (
            swap_layers,
            f"2 tensors do not hold the numbers that were written (they changed, or are in another order): {C_ATTN}",
        ),
        (
            put_experts_first,
            f"1 tensors do not hold the numbers that were written (they changed, or are in another order): {DOWN_B}",
        ),
    ],
)
def test_tensors_changed_after_writing_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], named: str, adapter: Path
) -> None:
    rewrite(adapter, change)
    assert named.partition("{}")[0] in refusal(adapter)


def test_a_file_of_another_tool_must_hold_all_that_its_config_declares(
    golden_adapter: Path, golden_base: Path, tmp_path: Path
) -> None:
    """One expert's projection is lost with both its factors, so that no incomplete pair shows it."""
    folder = tmp_path / "authors"
    architecture = architecture_of(LolaConfig.from_pretrained(golden_base))
    shutil.copytree(golden_adapter, folder)
    read_adapter(folder).weights(architecture).check_fit()
    state = load_file(folder / "adapter_model.safetensors")
    lost = "transformer.h.3.moe.experts.2.c_fc"
    save_file({key: tensor for key, tensor in state.items() if lost not in key}, folder / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=rf"{lost}: adapter_config.json says that it has LoRA, but the file holds none"
    ):
        read_adapter(folder).weights(architecture).check_fit()


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        ({"target_modules": ["attn.c_attn", "wte"]}, [*(f"h.{n}.attn.c_attn" for n in range(4)), "wte"]),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),
        ({"target_modules": ["c_fc"]}, ["h.0.mlp.c_fc", "h.2.mlp.c_fc"]),
        (
            {"target_modules": ["experts.0.c_fc"], "fan_in_fan_out": True},
            ["h.1.moe.experts.0.c_fc", "h.3.moe.experts.0.c_fc"],
        ),
        ({"target_modules": r".*\.h\.[01]\.attn\.c_proj"}, ["h.0.attn.c_proj", "h.1.attn.c_proj"]),
        ({"target_modules": ["attn.c_proj"], "layers_to_transform": [3]}, ["h.3.attn.c_proj"]),
        (
            {"target_modules": ["attn.c_proj"], "exclude_modules": ["h.3.attn.c_proj"]},
            [f"h.{n}.attn.c_proj" for n in range(3)],
        ),
        (
            {"target_parameters": ["1.moe.experts.down_proj"]},
            [f"h.1.moe.experts.{e}.c_proj" for e in range(E)],
        ),
    ],
)
def test_a_config_declares_modules_by_pefts_rules(config: dict[str, Any], lost: list[str], tiny: LolaConfig) -> None:
    found, saved = declared_modules(config, architecture_of(tiny))
    assert sorted(name.removeprefix("transformer.") for name in found) == sorted(lost)
    assert saved == []


@pytest.mark.parametrize("kept", [".attn.", ".mlp.", ".experts.", ".c_fc."])
def test_a_kind_of_module_that_the_file_lacks_is_left_out_with_a_warning(
    kept: str, golden_adapter: Path, golden_base: Path, tmp_path: Path
) -> None:
    """The authors' config names `c_proj` and `c_fc`. Only the file shows which modules have LoRA."""
    state = load_file(golden_adapter / "adapter_model.safetensors")
    shutil.copy(golden_adapter / "adapter_config.json", tmp_path)
    save_file({key: value for key, value in state.items() if kept in key}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="the adapter's file has no LoRA tensors for"):
        loaded = load_adapter(load_base(golden_base, None, "float32", quiet=True), tmp_path)
    found = adapter_weights(loaded).pairs
    assert found.keys() == {
        module for module in read_adapter(golden_adapter).weights(TINY).pairs if kept in f"{module}."
    }


def test_a_missing_trained_router_is_reported(everything: AdapterWeights) -> None:
    everything.declared = {"modules_to_save": ["gate"]}
    everything.check_fit()
    del everything.trained["transformer.h.3.moe.gate.weight"]
    with pytest.raises(AdapterError, match=r"h\.3\.moe\.gate: adapter_config.json says that it was trained"):
        everything.check_fit()


# What stock PEFT loads


@pytest.mark.parametrize(
    ("groups", "layout", "loads"),
    [
        ({"c_attn": (4, 8.0), "up": (2, 8.0)}, "peft", True),
        ({"c_attn": (4, 8.0), "up": (2, 8.0)}, "per_expert", False),
        ({"c_attn": (4, 8.0), "dora": True}, "peft", True),
        ({"c_attn": (4, 8.0), "up": (2, 8.0), "dora": True}, "peft", False),
    ],
)
def test_only_adapters_that_stock_peft_loads_say_so(
    groups: dict[str, Any], layout: str, loads: bool, make_weights: Callable[..., AdapterWeights], tmp_path: Path
) -> None:
    weights = make_weights(**groups)
    assert read_adapter(write_adapter(weights, tmp_path / "one", layout)).loads_with_stock_peft is loads
    weights.starts_at_rounding_error = True  # stock PEFT would load it onto unrounded weights
    assert not read_adapter(write_adapter(weights, tmp_path / "two", layout)).loads_with_stock_peft


# An adapter of another shape


def test_an_adapter_of_another_hidden_size_is_refused_with_both_shapes(
    everything: AdapterWeights, tiny: LolaConfig
) -> None:
    config = LolaConfig(**tiny.to_diff_dict() | {"n_embd": 32, "n_head": 2})
    with pytest.raises(AdapterError) as error:
        replace(everything, architecture=architecture_of(config)).check_fit()
    message = str(error.value)
    assert_says(message, "transformer.h.0.attn.c_attn: … [64, 192] … [32, 96]")
    assert message.count("\n") == 6  # five by name, the others counted
    assert "… and 25 more" in message


def test_an_adapter_of_a_deeper_base_is_refused_by_module(everything: AdapterWeights, tiny: LolaConfig) -> None:
    architecture = architecture_of(LolaConfig(**tiny.to_diff_dict() | {"n_layer": 2}))
    with pytest.raises(AdapterError, match=r"transformer.h.2.attn.c_attn: the base has no such module"):
        replace(everything, architecture=architecture).check_fit()


def test_a_router_of_another_shape_is_refused_with_both_shapes(
    make_weights: Callable[..., AdapterWeights], tiny: LolaConfig
) -> None:
    weights = make_weights(router=True)
    architecture = architecture_of(LolaConfig(**tiny.to_diff_dict() | {"num_experts": 8}))
    with pytest.raises(AdapterError, match=r"h.1.moe.gate.weight: \[4, 64\] in the adapter, \[8, 64\] in the base"):
        replace(weights, architecture=architecture).check_fit()


def test_lora_on_embeddings_and_head_is_refused_by_name(everything: AdapterWeights) -> None:
    pair = everything.pairs["transformer.h.0.attn.c_attn"]
    for name in ("lm_head", "transformer.h.9.attn.c_attn"):
        everything.pairs[name] = pair
    with pytest.raises(AdapterError) as error:
        everything.check_fit()
    assert "lm_head: the base has no such module" in str(error.value)
    assert_says(str(error.value), "transformer.h.9.attn.c_attn: … base")


# Writing


def test_a_written_adapter_has_the_files_and_keys_of_peft(adapter: Path) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
        assert json.loads(metadata.pop(CHECKSUMS_KEY)).keys() == set(file.keys())
    assert metadata == {"format": "pt", "lola_ft_layout": "peft/1", "base_fingerprint": "0123456789abcdef"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/lola"
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert config["target_parameters"] == ["experts.up_proj", "experts.down_proj"]
    assert config["modules_to_save"] == ["gate"]
    assert config["inference_mode"] is True


def test_an_unknown_layout_is_refused_and_nothing_written(everything: AdapterWeights, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="layout 'gguf' is not known; use one of peft, per_expert"):
        write_adapter(everything, tmp_path / "new", "gguf")
    assert not (tmp_path / "new").exists()


def test_an_older_adapter_is_replaced(adapter: Path, make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(c_attn=(2, 8.0))
    write_adapter(weights, adapter, "per_expert")
    assert read_adapter(adapter).weights(TINY).pairs.keys() == weights.pairs.keys()
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_a_folder_that_is_no_adapter_is_not_replaced(everything: AdapterWeights, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for taken in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{taken}: exists and holds no adapter"):
            write_adapter(everything, tmp_path / taken, "peft")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_keeps_the_older_adapter(adapter: Path, everything: AdapterWeights) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}

    def fail(folder: Path) -> None:
        assert (folder / "adapter_model.safetensors").is_file()
        raise OSError("no space left")

    everything.pairs.popitem()
    with pytest.raises(OSError, match="no space left"):
        write_adapter(everything, adapter, "peft", also=fail)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_further_files_are_written_with_the_adapter(everything: AdapterWeights, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "adapter"
    write_adapter(everything, out, "peft", also=lambda folder: (folder / "README.md").touch())
    assert (out / "README.md").is_file()


def test_weights_are_stored_in_their_own_dtype(everything: AdapterWeights, tmp_path: Path) -> None:
    everything.trained = {name: tensor.bfloat16() for name, tensor in everything.trained.items()}
    write_adapter(everything, tmp_path / "adapter", "peft")
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert tensor.dtype == (torch.bfloat16 if "gate" in name else torch.float32)
