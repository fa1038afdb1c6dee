"""The Hub tensors' names in the native model, and the conversion that transformers applies when it loads them.

The Hub stores 2-D weights of attention and MLP as in×out (GPT-2's Conv1D), and one tensor per expert. The native model
uses `nn.Linear` (out×in) for attention and dense MLP, because all tools support it, and fused experts (E, in, out).
"""

# Modules whose weight is transposed between disk (in×out) and memory (out×in).
LINEAR_MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# The two projections of an expert: name on disk -> name of the fused parameter.
EXPERT_PROJECTIONS = {"c_fc": "up_proj", "c_proj": "down_proj"}
# Buffers, and copies of tied weights, in old checkpoints.
IGNORED_KEYS = (r"\.attn\.bias$", r"\.attn\.masked_bias$", r"^lm_head\.weight$")


def register_conversion() -> None:
    """Register the Hub layout with transformers, for `from_pretrained` and (reversed) `save_pretrained`."""
    # Imported late, because these modules import most of transformers.
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
