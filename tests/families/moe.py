"""Tiny random mixtures of experts by model type, made and saved by stock transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lola_ft.nano.build import train_tokenizer

TEXT = ["Below is an instruction that describes a task. Write a response that completes the request.", "one two three"]
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "pad_token_id": 1,
}
SHARED = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK = SHARED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


@dataclass(frozen=True)
class Kind:
    """A family to test.

    Attributes:
        model, config: transformers' classes.
        sizes: Config keys of the tiny model, in addition to `COMMON`.
        groups: The groups that can have LoRA.
    """

    model: str
    config: str
    sizes: dict[str, Any]
    groups: tuple[str, ...] = ("attention", "experts", "router")


KINDS = {
    "olmoe": Kind(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "qwen3_moe": Kind(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 32,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
        ("attention", "mlp", "experts", "router"),
    ),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
        },
        ("attention", "mlp", "shared_experts", "experts", "router"),
    ),
    "mixtral": Kind(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoe": Kind(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.8,
            "embedding_multiplier": 4.0,
            "attention_multiplier": 0.2,
        },
    ),
    "deepseek_v2": Kind(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        DEEPSEEK | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "attention_bias": True},
        ("attention", "mlp", "shared_experts", "experts", "router"),
    ),
    "deepseek_v3": Kind(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        DEEPSEEK | {"q_lora_rank": 24},
        ("attention", "mlp", "shared_experts", "experts", "router"),
    ),
    "glm4_moe": Kind(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        SHARED | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True},
        ("attention", "mlp", "shared_experts", "experts", "router"),
    ),
    "dots1": Kind(
        "Dots1ForCausalLM",
        "Dots1Config",
        SHARED | {"sliding_window": 7, "max_window_layers": 1},
        ("attention", "mlp", "shared_experts", "experts", "router"),
    ),
    "ernie4_5_moe": Kind(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
            "tie_word_embeddings": False,
        },
        ("attention", "mlp", "shared_experts", "experts", "router"),
    ),
    "minimax_m2": Kind(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32, "rotary_dim": 16},
    ),
    "hunyuan_v1_moe": Kind(
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"intermediate_size": 32, "num_experts": 8, "moe_topk": 3, "head_dim": 32, "attention_bias": True},
        ("attention", "shared_experts", "experts", "router"),
    ),
}
SLOW_KINDS = (
    *("qwen3_moe", "qwen2_moe", "mixtral", "granitemoe", "ernie4_5_moe"),
    *("deepseek_v2", "glm4_moe", "dots1", "minimax_m2", "hunyuan_v1_moe"),
)
"""Kinds that only `make test-slow` tests, because other kinds have the same parts."""


def make_moe(folder: Path, kind: str, **changes: Any) -> Path:
    """Write a model with a tokenizer. Biases and norms are random too, because a new model's are all equal."""
    torch.manual_seed(3)
    own = KINDS[kind]
    config = getattr(transformers, own.config)(**COMMON | own.sizes | changes)
    model = getattr(transformers, own.model)(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer += 0.1 * torch.randn_like(buffer)
    model.save_pretrained(folder)
    train_tokenizer(TEXT, vocab_size=320, max_length=128).save_pretrained(folder)
    return folder
