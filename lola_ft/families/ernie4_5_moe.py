"""ERNIE 4.5's mixtures (`ernie4_5_moe`): softmax in float32, a correction term for the choice, shared experts."""

from typing import Any

from lola_ft.errors import CheckpointError
from lola_ft.families import decoder, deepseek
from lola_ft.families.mixture import ExpertKeys, every_nth, mixture_family
from lola_ft.families.place import Place


def moe_layers(config: Any) -> tuple[int, ...]:
    """Return the indices of the layers with experts. The others have a dense MLP."""
    last = min(config.moe_layer_end_index, config.num_hidden_layers - 1)
    return every_nth(range(config.moe_layer_start_index, last + 1), config.moe_layer_interval)


def places(config: Any) -> dict[str, Place]:
    """List every tensor of a checkpoint by Hub name.

    Raises:
        CheckpointError: For a config with biases: no published model has them, and its output head would need one.
    """
    if config.use_bias:
        raise CheckpointError(
            "config.json: use_bias is true, and ERNIE models with biases are not supported. Choose a base without."
        )
    found = decoder.ends(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found |= decoder.attention(prefix, config, layer)
        if layer in moe_layers(config):
            found |= mixture(prefix, config, layer)
        else:
            found |= decoder.dense_mlp(prefix, config, layer)
    return found


def mixture(prefix: str, config: Any, layer: int) -> dict[str, Place]:
    """List router, experts and shared experts of a layer."""
    hidden, inner, num_experts = config.hidden_size, config.moe_intermediate_size, config.moe_num_experts
    gate, statics = f"{prefix}.mlp.gate", f"moe_statics.{deepseek.CORRECTION}"
    found = decoder.router(gate, gate, num_experts, hidden, layer, float32=True)
    found |= decoder.correction(f"{prefix}.mlp.{statics}", f"{gate}.{statics}", (1, num_experts), layer)
    found |= decoder.experts(prefix, decoder.EXPERTS, hidden, inner, num_experts, layer)
    if config.moe_num_shared_experts:
        shared = inner * config.moe_num_shared_experts
        found |= decoder.gated_mlp(f"{prefix}.mlp.shared_experts", hidden, shared, "shared_experts", layer)
    return found


ERNIE4_5_MOE = mixture_family(
    "ernie4_5_moe",
    "ERNIE 4.5 MoE",
    "Ernie4_5_MoeForCausalLM",
    places,
    ExpertKeys("moe_num_experts", "moe_intermediate_size", "moe_k"),
    moe_layers=moe_layers,
    dense_layers=True,
    shared_targets=deepseek.SHARED_TARGETS,
    renamed={"mlp.moe_statics": "mlp.gate.moe_statics"},
    more_keys=lambda sizes: {"moe_layer_end_index": sizes.layers - 1, "moe_num_shared_experts": 1},
    set_aside=lambda name, _: name.startswith("model.mtp_"),
)
