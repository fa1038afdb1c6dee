"""GPT-2 and models of its type (`gpt2`, such as mGPT): learned positions, biases, matrices stored in×out (`Conv1D`)."""

from typing import Any

from lola_ft.families.family import Family, Sizes
from lola_ft.families.place import Place

IGNORED = (r"\.attn\.bias$", r"\.attn\.masked_bias$")
"""Attention's buffers in old checkpoints."""


def sizes(config: Any) -> Sizes:
    """Read a `GPT2Config`."""
    return Sizes(
        vocab=config.vocab_size,
        hidden=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        positions=config.n_positions,
        activation=config.activation_function,
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
    )


def config_keys(sizes: Sizes) -> dict[str, Any]:
    """Return the config keys for these sizes, which LOLA has, too."""
    return {
        "vocab_size": sizes.vocab,
        "n_embd": sizes.hidden,
        "n_inner": sizes.inner,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "n_positions": sizes.positions,
        "embd_pdrop": sizes.embedding_dropout,
        "attn_pdrop": sizes.attention_dropout,
        "resid_pdrop": sizes.residual_dropout,
    }


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name."""
    d, f = config.n_embd, config.n_inner or 4 * config.n_embd
    found = embeddings(config.vocab_size, config.n_positions, d)
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}"
        found |= norm(f"{prefix}.ln_1", d, layer) | norm(f"{prefix}.ln_2", d, layer)
        found |= attention(prefix, d, layer) | mlp(prefix, d, f, layer)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Place("lm_head.weight", (config.vocab_size, d), "head")
    return found


def embeddings(vocab: int, positions: int, hidden: int) -> dict[str, Place]:
    """List the embeddings of tokens and positions, and the final norm."""
    found = {
        name: Place(name, (rows, hidden), "embeddings")
        for name, rows in (("transformer.wte.weight", vocab), ("transformer.wpe.weight", positions))
    }
    return found | norm("transformer.ln_f", hidden, None)


def norm(name: str, hidden: int, layer: int | None) -> dict[str, Place]:
    """List weight and bias of a LayerNorm."""
    return {f"{name}.{kind}": Place(f"{name}.{kind}", (hidden,), "norms", layer) for kind in ("weight", "bias")}


def attention(prefix: str, hidden: int, layer: int) -> dict[str, Place]:
    """List the joint projection of query, key and value, and the output projection."""
    joint = linear(f"{prefix}.attn.c_attn", hidden, 3 * hidden, "attention", layer)
    return joint | linear(f"{prefix}.attn.c_proj", hidden, hidden, "attention", layer)


def mlp(prefix: str, hidden: int, inner: int, layer: int) -> dict[str, Place]:
    """List the two layers of a dense MLP."""
    up = linear(f"{prefix}.mlp.c_fc", hidden, inner, "mlp", layer)
    return up | linear(f"{prefix}.mlp.c_proj", inner, hidden, "mlp", layer)


def linear(name: str, size_in: int, size_out: int, group: str, layer: int) -> dict[str, Place]:
    """List weight (stored in×out) and bias of a linear layer."""
    return {
        f"{name}.weight": Place(f"{name}.weight", (size_in, size_out), group, layer, in_by_out=True),
        f"{name}.bias": Place(f"{name}.bias", (size_out,), group, layer),
    }


GPT2 = Family(
    model_type="gpt2",
    title="GPT-2",
    heads={"causal_lm": "transformers:GPT2LMHeadModel"},
    backbone="transformer",
    positions="learned",
    packs=True,
    norm="layer",
    targets={"attention": ("attn.c_attn", "attn.c_proj"), "mlp": ("mlp.c_fc", "mlp.c_proj")},
    size_keys=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    embeddings=("transformer.wte.weight", "lm_head.weight"),
    sizes=sizes,
    config_keys=config_keys,
    places=places,
    ignored=IGNORED,
)
