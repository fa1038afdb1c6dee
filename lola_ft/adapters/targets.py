"""The names of the weights that an adapter may train, as PEFT and the files write them."""

ATTENTION_TARGETS = ("attn.c_attn", "attn.c_proj")
MLP_TARGETS = ("mlp.c_fc", "mlp.c_proj")
EXPERT_TARGETS = ("experts.up_proj", "experts.down_proj")
ROUTER_TARGETS = ("moe.gate",)
GROUPS = {"attention": ATTENTION_TARGETS, "mlp": MLP_TARGETS, "experts": EXPERT_TARGETS, "router": ROUTER_TARGETS}
ROUTER_MODULE = "gate"
NORM_MODULES = ("ln_1", "ln_2", "ln_f")
TIED_MODULES = ("wte", "lm_head")
TIED_REASON = (
    "LOLA's embeddings (wte) and output head (lm_head) are one tensor, so two updates of it contradict each other and "
    "could not be merged."
)

Selection = tuple[tuple[int, ...], ...]
"""The experts that get LoRA, for each MoE layer in order."""


def target_of(module: str, layout: str) -> str | None:
    """The shortest ending of a module (the Hub's name) that says in a layout's config what is meant."""
    *_, experts, expert, projection = ("", "", *module.split("."))
    if experts == "experts":
        fused = EXPERT_TARGETS[0] if projection == "c_fc" else EXPERT_TARGETS[1]
        return f"experts.{expert}.{projection}" if layout == "per_expert" else fused
    return next((target for targets in GROUPS.values() for target in targets if module.endswith(target)), None)
