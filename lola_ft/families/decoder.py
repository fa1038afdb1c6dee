"""Parts that transformers' Llama-like decoders share, as tensors of a checkpoint. Families put them together.

These decoders have biases in attention only, matrices out×in, RMS norms, rotary positions, gated MLPs and experts.
"""

from typing import Any

from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.families.family import Family, Sizes
from lola_ft.families.place import Place

ATTENTION_TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP_TARGETS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OLD_BUFFERS = (r"\.rotary_emb\.inv_freq$",)
"""Rotary angles, which checkpoints of earlier transformers contain."""

EXPERTS = ExpertLayout("mlp.experts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
"""The experts of most families, fused in memory since transformers 5."""


def family(model_type: str, title: str, model: str, **own: Any) -> Family:
    """Return the family of a Llama-like decoder.

    Args:
        model: Name of transformers' class.
        own: The fields of `Family` in which these decoders differ.
    """
    return Family(
        model_type=model_type,
        title=title,
        heads={"causal_lm": f"transformers:{model}"},
        backbone="model",
        positions="rotary",
        packs=True,
        embeddings=EMBEDDINGS,
        **own,
    )


def sizes(config: Any, **own: Any) -> Sizes:
    """Read the sizes that the configs of these families have in common.

    Args:
        own: Other fields of `Sizes`, such as those of experts.
    """
    return Sizes(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        positions=config.max_position_embeddings,
        activation=config.hidden_act,
        attention_dropout=getattr(config, "attention_dropout", 0.0),
        **own,
    )


def config_keys(sizes: Sizes) -> dict[str, Any]:
    """Return the config keys for these sizes. Every head has its own keys and values."""
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "head_dim": sizes.hidden // sizes.heads,
        "max_position_embeddings": sizes.positions,
    }


def ends(config: Any) -> dict[str, Place]:
    """List embeddings, the final norm, and the output head if it is not tied to the embeddings."""
    tokens, head = EMBEDDINGS
    found = {tokens: Place(tokens, (config.vocab_size, config.hidden_size), "embeddings")}
    found |= norm("model.norm", config.hidden_size, None)
    if not config.tie_word_embeddings:
        found[head] = Place(head, (config.vocab_size, config.hidden_size), "head")
    return found


def norm(name: str, size: int, layer: int | None) -> dict[str, Place]:
    """List the weight of an RMS norm."""
    return {f"{name}.weight": Place(f"{name}.weight", (size,), "norms", layer)}


def linear(name: str, size_in: int, size_out: int, group: str, layer: int, bias: bool = False) -> dict[str, Place]:
    """List weight and, on request, bias of a linear layer."""
    found = {f"{name}.weight": Place(f"{name}.weight", (size_out, size_in), group, layer)}
    if bias:
        found[f"{name}.bias"] = Place(f"{name}.bias", (size_out,), group, layer)
    return found


def head_size(config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention(
    prefix: str, config: Any, layer: int, biases: bool = False, output_bias: bool = False
) -> dict[str, Place]:
    """List the norms around attention and its four projections. Keys and values may have fewer heads than queries."""
    hidden, size = config.hidden_size, head_size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    found = norm(f"{prefix}.input_layernorm", hidden, layer)
    for name, size_out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        found |= linear(f"{prefix}.self_attn.{name}", hidden, size_out, "attention", layer, biases)
    found |= linear(f"{prefix}.self_attn.o_proj", queries, hidden, "attention", layer, output_bias)
    return found | norm(f"{prefix}.post_attention_layernorm", hidden, layer)


def query_key_norms(prefix: str, queries: int, keys: int, layer: int) -> dict[str, Place]:
    """List the norms of queries and keys."""
    return norm(f"{prefix}.self_attn.q_norm", queries, layer) | norm(f"{prefix}.self_attn.k_norm", keys, layer)


def gated_mlp(name: str, hidden: int, inner: int, group: str, layer: int, biases: bool = False) -> dict[str, Place]:
    """List gate, up and down of a dense layer or of a shared expert."""
    found = linear(f"{name}.gate_proj", hidden, inner, group, layer, biases)
    found |= linear(f"{name}.up_proj", hidden, inner, group, layer, biases)
    return found | linear(f"{name}.down_proj", inner, hidden, group, layer, biases)


def dense_mlp(prefix: str, config: Any, layer: int, biases: bool = False) -> dict[str, Place]:
    """List the MLP of a layer without experts."""
    return gated_mlp(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, "mlp", layer, biases)


def router(
    on_disk: str, in_memory: str, num_experts: int, hidden: int, layer: int, float32: bool = False
) -> dict[str, Place]:
    """List the router's weight."""
    place = Place(f"{in_memory}.weight", (num_experts, hidden), "router", layer, float32=float32)
    return {f"{on_disk}.weight": place}


def correction(on_disk: str, in_memory: str, shape: tuple[int, ...], layer: int) -> dict[str, Place]:
    """List the term that is added to a router's scores only for the choice of experts (arXiv 2408.15664)."""
    return {on_disk: Place(in_memory, shape, "other", layer, float32=True, correction=True)}


def experts(
    prefix: str, layout: ExpertLayout, hidden: int, inner: int, num_experts: int, layer: int
) -> dict[str, Place]:
    """List gate, up and down of every expert of a layer. In memory, gate and up are one stack."""
    module = f"{prefix}.{layout.module}"
    found: dict[str, Place] = {}
    for expert in range(num_experts):
        for stack, names in layout.stacks.items():
            for number, projection in enumerate(names):
                part = ("gate_proj", "up_proj")[number] if len(names) > 1 else None
                shape = (hidden, inner) if stack == "down_proj" else (inner, hidden)
                name = f"{layout.name(module, expert, projection)}.weight"
                found[name] = Place(f"{module}.{stack}", shape, "experts", layer, expert, part=part)
    return found
