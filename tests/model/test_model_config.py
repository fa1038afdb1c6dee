"""The config refuses settings that the model does not support, all of them in one message."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lola_ft.errors import CheckpointError, UserError
from lola_ft.model import LolaConfig


def test_defaults_are_the_published_model() -> None:
    config = LolaConfig()
    assert (config.n_layer, config.n_embd, config.n_head, config.n_inner) == (24, 2048, 16, 8192)
    assert (config.num_experts, config.topk, config.vocab_size, config.n_positions) == (16, 1, 100_096, 2048)
    assert (config.bos_token_id, config.eos_token_id) == (0, 5)
    assert [n for n in range(6) if config.is_moe_layer(n)] == [1, 3, 5]


def test_transformers_names_are_aliases() -> None:
    config = LolaConfig(n_embd=64, n_layer=2, n_head=4, n_inner=96)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    assert (config.intermediate_size, config.num_experts_per_tok) == (96, 1)
    assert config.max_position_embeddings == config.n_positions


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_every_name_of_tanh_gelu_is_known(name: str) -> None:
    assert LolaConfig(activation_function=name).activation_function == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk": 2}, "topk is 2"),
        ({"topk": "1"}, "topk is '1'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu', not one of gelu_new"),
        ({"activation_function": "relu"}, "'relu'"),
        ({"n_embd": 64, "n_head": 5}, "n_embd 64 is not a multiple of n_head 5"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"n_embd": "64"}, "n_embd is '64', not a positive integer"),
        ({"n_embd": None}, "n_embd is None, not a positive integer"),
        ({"n_head": 0}, "n_head is 0, not a positive integer"),
        ({"num_experts": -4}, "num_experts is -4, not a positive integer"),
        ({"n_inner": 1.5}, "n_inner is 1.5, not a positive integer"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: ") as caught:
        LolaConfig(**change)
    assert words in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_all_mistakes_come_in_one_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        LolaConfig(topk=2, activation_function="relu", tie_word_embeddings=False)
    assert all(word in str(caught.value) for word in ("topk", "activation_function", "tie_word_embeddings"))


def test_a_config_survives_saving(tmp_path: Path) -> None:
    config = LolaConfig(n_embd=64, n_head=4, n_layer=2, num_experts=8, router_aux_loss_coef=0.5, attn_pdrop=0.25)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LolaConfig
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "lola_v1"
    assert {"n_embd", "n_head", "n_inner", "topk"} <= set(written)
    assert "hidden_size" not in written
