"""Adapter folders: what is wrong with one is said by name, and writing is all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lola_ft.adapters.files import read_adapter, write_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import AdapterError, UserError
from lola_ft.model import LolaConfig
from lola_ft.model.hub_checkpoint import expected_shapes

E = 4


@pytest.fixture
def adapter(everything: AdapterWeights, tmp_path: Path) -> Path:
    """A whole adapter folder, to be damaged."""
    everything.base, everything.base_fingerprint = "someone/lola", "0123456789abcdef"
    return write_adapter(everything, tmp_path / "adapter", "peft", E)


def change_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


def refusal(adapter: Path) -> str:
    with pytest.raises(AdapterError) as error:
        read_adapter(adapter).weights(E)
    assert str(adapter) in str(error.value)
    return str(error.value)


# Reading


def test_a_missing_folder_or_config(tmp_path: Path, adapter: Path) -> None:
    assert "no adapter here" in refusal(tmp_path / "nowhere")
    (adapter / "adapter_config.json").unlink()
    assert "holds adapter_config.json and adapter_model.safetensors" in refusal(adapter)


def test_a_missing_weights_file(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "damaged or incomplete" in refusal(adapter)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_weights_file(keep: int, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "damaged or incomplete" in refusal(adapter)


@pytest.mark.parametrize("text", ["{", "", '{"peft_type": "LORA"', "\xff\xfe"])
def test_a_damaged_config(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "damaged or incomplete" in refusal(adapter)


def test_a_config_that_is_no_object(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[1]")
    assert "adapter_config.json: holds list, not an object" in refusal(adapter)


@pytest.mark.parametrize("peft_type", ["LOHA", "PROMPT_TUNING", None])
def test_another_kind_of_adapter(peft_type: str | None, adapter: Path) -> None:
    change_config(adapter, peft_type=peft_type)
    assert f"peft_type is {peft_type}; lola_ft reads LoRA adapters" in refusal(adapter)


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
def test_a_setting_that_would_change_the_numbers(key: str, value: Any, adapter: Path) -> None:
    change_config(adapter, **{key: value})
    message = refusal(adapter)
    assert f"adapter_config.json: {key} is {value}" in message
    assert "does not support" in message


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_leaves_the_base_alone(
    value: Any, adapter: Path, everything: AdapterWeights, same: Callable[[AdapterWeights, AdapterWeights], None]
) -> None:
    change_config(adapter, init_lora_weights=value)
    same(read_adapter(adapter).weights(E), everything)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float, adapter: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.1.moe.experts.lora_B.weight"
    state[key][0, 0] = value
    save_file(state, adapter / "adapter_model.safetensors")
    message = refusal(adapter)
    assert "1 tensors hold NaN or infinite values" in message
    assert key in message


def test_a_later_version_of_the_layout(adapter: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    save_file(state, adapter / "adapter_model.safetensors", metadata={"lola_ft_layout": "peft/2"})
    assert "its layout has version 2; this lola_ft reads 1" in refusal(adapter)


# An adapter of another shape


def test_an_adapter_of_another_hidden_size(everything: AdapterWeights, tiny: LolaConfig) -> None:
    config = LolaConfig(**tiny.to_diff_dict() | {"n_embd": 32, "n_head": 2})
    with pytest.raises(AdapterError) as error:
        everything.check_against(expected_shapes(config))
    message = str(error.value)
    assert "transformer.h.0.attn.c_attn: the adapter changes a [64, 192] weight, the base's is [32, 96]" in message
    assert message.count("\n") == 6  # five by name, the rest counted
    assert "… and 25 more" in message


def test_an_adapter_of_a_deeper_base(everything: AdapterWeights, tiny: LolaConfig) -> None:
    shapes = expected_shapes(LolaConfig(**tiny.to_diff_dict() | {"n_layer": 2}))
    with pytest.raises(AdapterError, match=r"transformer.h.2.attn.c_attn: the base has no such module"):
        everything.check_against(shapes)


def test_a_router_of_another_shape(make_weights: Callable[..., AdapterWeights], tiny: LolaConfig) -> None:
    weights = make_weights(router=True)
    shapes = expected_shapes(LolaConfig(**tiny.to_diff_dict() | {"num_experts": 8}))
    with pytest.raises(AdapterError, match=r"h.1.moe.gate.weight: \[4, 64\] in the adapter, \[8, 64\] in the base"):
        weights.check_against(shapes)


def test_lora_on_embeddings_and_head_is_refused_by_name(everything: AdapterWeights, tiny: LolaConfig) -> None:
    pair = everything.pairs["transformer.h.0.attn.c_attn"]
    for name in ("lm_head", "transformer.h.9.attn.c_attn"):
        everything.pairs[name] = pair
    with pytest.raises(AdapterError) as error:
        everything.check_against(expected_shapes(tiny))
    assert "lm_head: the base has no such module" in str(error.value)
    assert "transformer.h.9.attn.c_attn: the base has no such module" in str(error.value)


# Writing


def test_what_is_written(adapter: Path) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "lola_ft_layout": "peft/1",
            "base_fingerprint": "0123456789abcdef",
        }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/lola"
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert config["target_parameters"] == ["experts.up_proj", "experts.down_proj"]
    assert config["modules_to_save"] == ["gate"]
    assert config["inference_mode"] is True


def test_an_unknown_layout(everything: AdapterWeights, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="layout 'gguf' is not known; use one of peft, per_expert"):
        write_adapter(everything, tmp_path / "new", "gguf", E)
    assert not (tmp_path / "new").exists()


def test_an_older_adapter_is_replaced(adapter: Path, make_weights: Callable[..., AdapterWeights]) -> None:
    weights = make_weights(c_attn=(2, 8.0))
    write_adapter(weights, adapter, "per_expert", E)
    assert read_adapter(adapter).weights(E).pairs.keys() == weights.pairs.keys()
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_what_is_no_adapter_is_not_replaced(everything: AdapterWeights, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    for taken in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{taken}: already there and no adapter"):
            write_adapter(everything, tmp_path / taken, "peft", E)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_keeps_the_older_adapter(adapter: Path, everything: AdapterWeights) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}

    def fail(folder: Path) -> None:
        assert (folder / "adapter_model.safetensors").is_file()
        raise OSError("no space left")

    everything.pairs.popitem()
    with pytest.raises(OSError, match="no space left"):
        write_adapter(everything, adapter, "peft", E, also=fail)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_what_belongs_beside_the_adapter_comes_with_it(everything: AdapterWeights, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "adapter"
    write_adapter(everything, out, "peft", E, also=lambda folder: (folder / "README.md").touch())
    assert (out / "README.md").is_file()


def test_numbers_are_stored_in_the_precision_they_have(everything: AdapterWeights, tmp_path: Path) -> None:
    everything.trained = {name: tensor.bfloat16() for name, tensor in everything.trained.items()}
    write_adapter(everything, tmp_path / "adapter", "peft", E)
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert tensor.dtype == (torch.bfloat16 if "gate" in name else torch.float32)
