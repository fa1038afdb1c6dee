"""BLOOM (`bloom`): ALiBi slopes instead of position embeddings, biases, matrices stored out×in."""

from typing import Any

from lola_ft.families.family import Family, Sizes
from lola_ft.families.place import Place

TRAINED_LENGTH = 2048
"""Length in tokens of the sequences that BLOOM was trained on. A config may leave it out."""


def sizes(config: Any) -> Sizes:
    """Read a `BloomConfig`."""
    return Sizes(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        inner=4 * config.hidden_size,
        layers=config.n_layer,
        heads=config.n_head,
        positions=getattr(config, "seq_length", None) or TRAINED_LENGTH,
        activation="bloom_gelu",
        attention_dropout=config.attention_dropout,
        residual_dropout=config.hidden_dropout,
    )


def config_keys(sizes: Sizes) -> dict[str, Any]:
    """Return the config keys for these sizes. `inner` is always four times `hidden`."""
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "seq_length": sizes.positions,
        "attention_dropout": sizes.attention_dropout,
        "hidden_dropout": sizes.residual_dropout,
    }


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    d = config.hidden_size
    words = "transformer.word_embeddings.weight"
    found = {words: Place(words, (config.vocab_size, d), "embeddings")}
    found |= _vector("transformer.word_embeddings_layernorm", d, "norms")
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}"
        found |= _vector(f"{prefix}.input_layernorm", d, "norms", layer)
        found |= _linear(f"{prefix}.self_attention.query_key_value", d, 3 * d, "attention", layer)
        found |= _linear(f"{prefix}.self_attention.dense", d, d, "attention", layer)
        found |= _vector(f"{prefix}.post_attention_layernorm", d, "norms", layer)
        found |= _linear(f"{prefix}.mlp.dense_h_to_4h", d, 4 * d, "mlp", layer)
        found |= _linear(f"{prefix}.mlp.dense_4h_to_h", 4 * d, d, "mlp", layer)
    found |= _vector("transformer.ln_f", d, "norms")
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Place("lm_head.weight", (config.vocab_size, d), "head")
    return found


def _vector(name: str, size: int, group: str, layer: int | None = None) -> dict[str, Place]:
    return {f"{name}.{kind}": Place(f"{name}.{kind}", (size,), group, layer) for kind in ("weight", "bias")}


def _linear(name: str, size_in: int, size_out: int, group: str, layer: int) -> dict[str, Place]:
    return {
        f"{name}.weight": Place(f"{name}.weight", (size_out, size_in), group, layer),
        f"{name}.bias": Place(f"{name}.bias", (size_out,), group, layer),
    }


BLOOM = Family(
    model_type="bloom",
    title="BLOOM",
    heads={"causal_lm": "transformers:BloomForCausalLM"},
    backbone="transformer",
    positions="slopes",
    packs=False,  # transformers passes no position ids to its attention, so it cannot see where a document begins
    attention="scores",
    norm="layer",
    normed_embeddings=True,
    targets={
        "attention": ("self_attention.query_key_value", "self_attention.dense"),
        "mlp": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    },
    size_keys=("vocab_size", "hidden_size", "n_layer", "n_head"),
    embeddings=("transformer.word_embeddings.weight", "lm_head.weight"),
    sizes=sizes,
    config_keys=config_keys,
    places=places,
)
