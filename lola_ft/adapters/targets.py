"""The names of the weights that get LoRA, as PEFT and the files write them."""

ATTENTION_TARGETS = ("attn.c_attn", "attn.c_proj")
MLP_TARGETS = ("mlp.c_fc", "mlp.c_proj")
EXPERT_TARGETS = ("experts.up_proj", "experts.down_proj")
ROUTER_MODULE = "gate"
