"""Where each tensor of a Hub checkpoint lives in the native model, and the conversion that transformers applies.

The Hub stores 2-D weights of attention and MLP as in×out (GPT-2's Conv1D) and one tensor an expert. The native model
uses `nn.Linear` (out×in) for attention and dense MLP, so that every tool knows them, and fused experts (E, in, out).
"""

import re
from dataclasses import dataclass

# Modules whose weight is transposed between disk (in×out) and memory (out×in).
LINEAR_MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# The two projections of an expert: name on disk -> name of the fused parameter.
EXPERT_PROJECTIONS = {"c_fc": "up_proj", "c_proj": "down_proj"}
# Buffers and copies that old checkpoints carry beside the weights.
IGNORED_KEYS = (r"\.attn\.bias$", r"\.attn\.masked_bias$", r"^lm_head\.weight$")

_EXPERT_KEY = re.compile(r"^(?P<moe>.+\.moe\.experts)\.(?P<expert>\d+)\.(?P<proj>c_fc|c_proj)\.(?P<kind>weight|bias)$")
_LINEAR_KEY = re.compile(r"^.+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")


@dataclass(frozen=True)
class Place:
    """Where a Hub tensor goes: parameter name, which expert's slice of it, whether it is stored transposed."""

    parameter: str
    expert_id: int | None = None
    transposed: bool = False


def place_of(hub_key: str) -> Place:
    """Find the native parameter for a Hub checkpoint key (keys start with `transformer.`)."""
    match = _EXPERT_KEY.match(hub_key)
    if match:
        suffix = "_bias" if match["kind"] == "bias" else ""
        name = f"{match['moe']}.{EXPERT_PROJECTIONS[match['proj']]}{suffix}"
        return Place(name, expert_id=int(match["expert"]))
    return Place(hub_key, transposed=_LINEAR_KEY.match(hub_key) is not None)


def is_ignored(hub_key: str) -> bool:
    """Whether a key is a legacy buffer or a copy of the tied embeddings, not a weight of its own."""
    return any(re.search(pattern, hub_key) for pattern in IGNORED_KEYS)


def is_quantized(hub_key: str) -> bool:
    """Whether 4-bit loading quantises this tensor."""
    names = (*LINEAR_MODULES, *EXPERT_PROJECTIONS)
    return any(hub_key.endswith(f"{name}.weight") for name in names)


def register_conversion() -> None:
    """Teach transformers the Hub layout, for `from_pretrained` and, reversed, `save_pretrained`."""
    # Here, because they bring most of transformers.
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

    converters = [
        WeightConverter(f"{module}.weight", f"{module}.weight", operations=[Transpose(0, 1)])
        for module in LINEAR_MODULES
    ]
    for disk_name, fused_name in EXPERT_PROJECTIONS.items():
        for disk_kind, fused_suffix in (("weight", ""), ("bias", "_bias")):
            converters.append(
                WeightConverter(
                    f"moe.experts.*.{disk_name}.{disk_kind}",
                    f"moe.experts.{fused_name}{fused_suffix}",
                    operations=[MergeModulelist(dim=0)],
                )
            )
    register_checkpoint_conversion_mapping("lola_v1", converters, overwrite=True)
