"""The names of the weights that an adapter may train, as PEFT and the files write them."""

ATTENTION_TARGETS = ("attn.c_attn", "attn.c_proj")
MLP_TARGETS = ("mlp.c_fc", "mlp.c_proj")
EXPERT_TARGETS = ("experts.up_proj", "experts.down_proj")
ROUTER_TARGETS = ("moe.gate",)
GROUPS = {"attention": ATTENTION_TARGETS, "mlp": MLP_TARGETS, "experts": EXPERT_TARGETS, "router": ROUTER_TARGETS}
ROUTER_MODULE = "gate"
NORM_MODULES = ("ln_1", "ln_2", "ln_f")

Selection = tuple[tuple[int, ...], ...]
"""The experts that get LoRA, for each MoE layer in order."""
