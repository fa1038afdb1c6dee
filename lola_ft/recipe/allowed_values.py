"""The values that recipe keys accept. Other libraries' names are listed because importing those takes seconds."""

from typing import Literal

Format = Literal[
    "alpaca", "prompt_completion", "text", "messages", "classification", "translation", "preference",
    "unpaired_preference",
]  # fmt: skip

OBJECTIVE_FORMATS: dict[str, str] = {"dpo": "preference", "kto": "unpaired_preference"}
"""The format that each objective learns from; sft learns from all other formats."""

PREFERENCE_LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
        *("discopop", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
}
"""TRL's loss types that need no further settings, TRL's default first."""

PREFERENCE_LOSS_TYPES = tuple(name for names in PREFERENCE_LOSSES.values() for name in names)

INSTRUCTION_FIELDS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "labels"),
    "translation": ("source", "source_language", "target_language"),
}
"""The names that an `instruction` may have in braces, by format."""

SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
"""transformers' SchedulerType."""

OPTIMIZERS = (
    "adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla",
    "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix",
    "sgd", "adagrad", "adamw_bnb_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo",
    "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw",
    "apollo_adamw_layerwise", "stable_adamw",
)  # fmt: skip
"""`adamw` (adamw_torch_fused or adamw_torch, whichever the machine has), `adamw_8bit`, then transformers' names."""
