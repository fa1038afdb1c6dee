"""LOLA (`lola_v1`; arXiv 2409.11272): GPT-2 style layers, every second one with experts, top-1."""

from typing import Any

from lola_ft.families import gpt2
from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.families.family import Family, Routing, Sizes
from lola_ft.families.gpt2 import IGNORED, attention, embeddings, mlp, norm
from lola_ft.families.place import Place
from lola_ft.model.conversion import EXPERT_PROJECTIONS


def sizes(config: Any) -> Sizes:
    """Read a `LolaConfig`."""
    return Sizes(
        vocab=config.vocab_size,
        hidden=config.n_embd,
        inner=config.n_inner,
        layers=config.n_layer,
        heads=config.n_head,
        positions=config.n_positions,
        moe_layers=tuple(filter(config.is_moe_layer, range(config.n_layer))),
        num_experts=config.num_experts,
        expert_inner=config.n_inner,
        top_k=config.topk,
        activation="gelu_pytorch_tanh",
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
    )


def config_keys(sizes: Sizes) -> dict[str, Any]:
    """Return the config keys for these sizes."""
    return gpt2.config_keys(sizes) | {"num_experts": sizes.num_experts, "topk": sizes.top_k}


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name.

    Matrices are stored in×out, except the router's. Each projection of each expert is a tensor.
    """
    d, f = config.n_embd, config.n_inner
    found = embeddings(config.vocab_size, config.n_positions, d)
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}"
        found |= norm(f"{prefix}.ln_1", d, layer) | norm(f"{prefix}.ln_2", d, layer)
        found |= attention(prefix, d, layer)
        if not config.is_moe_layer(layer):
            found |= mlp(prefix, d, f, layer)
            continue
        gate = f"{prefix}.moe.gate.weight"
        found[gate] = Place(gate, (config.num_experts, d), "router", layer)
        for expert in range(config.num_experts):
            for projection, (size_in, size_out) in (("c_fc", (d, f)), ("c_proj", (f, d))):
                name = f"{prefix}.moe.experts.{expert}.{projection}"
                stack = f"{prefix}.moe.experts.{EXPERT_PROJECTIONS[projection]}"
                found[f"{name}.weight"] = Place(stack, (size_in, size_out), "experts", layer, expert, in_by_out=True)
                found[f"{name}.bias"] = Place(f"{stack}_bias", (size_out,), "experts", layer, expert)
    return found


LOLA = Family(
    model_type="lola_v1",
    title="LOLA",
    heads={
        "causal_lm": "lola_ft.model.modeling:LolaForCausalLM",
        "sequence_classification": "lola_ft.model.heads:LolaForSequenceClassification",
        "token_classification": "lola_ft.model.heads:LolaForTokenClassification",
    },
    backbone="transformer",
    positions="learned",
    packs=True,
    norm="layer",
    targets={
        "attention": ("attn.c_attn", "attn.c_proj"),
        "mlp": ("mlp.c_fc", "mlp.c_proj"),
        "router": ("moe.gate",),
    },
    size_keys=("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_experts"),
    embeddings=("transformer.wte.weight", "lm_head.weight"),
    sizes=sizes,
    config_keys=config_keys,
    places=places,
    ignored=IGNORED,
    experts=ExpertLayout("moe.experts", {fused: (disk,) for disk, fused in EXPERT_PROJECTIONS.items()}),
    routing=Routing(balance="layer_sum"),
    hub_class="LolaForCausalLM",
    auto_map={
        "AutoConfig": "configuration_lola.LolaConfig",
        "AutoModel": "modeling_lola.LolaModel",
        "AutoModelForCausalLM": "modeling_lola.LolaForCausalLM",
        # `transformers serve` (5.23) asks this Auto class first. Without an entry it finds only transformers' classes.
        "AutoModelForDecision": "modeling_lola.LolaForCausalLM",
    },
    licence="cc-by-4.0",
    licence_name="[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)",
    authors_url="https://arxiv.org/abs/2409.11272",
    tags=("lola", "mixture-of-experts", "multilingual"),
)
