"""What to train beside the frozen base: plain settings, and PEFT's config for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lola_ft.adapters.targets import EXPERT_TARGETS, GROUPS, NORM_MODULES, ROUTER_MODULE, Selection
from lola_ft.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

INITS = ("default", "gaussian", "loftq")


@dataclass(frozen=True)
class AdapterSettings:
    """What to train beside the frozen base.

    Attributes:
        attention_rank, mlp_rank, expert_rank, router_rank: LoRA rank of each group; None leaves the group out.
        alpha: The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`).
        dropout: Of the side path's input.
        alphas, dropouts: Of a group alone (attention, mlp, experts, router), in place of the common one.
        rslora: Scale by alpha / sqrt(rank) (arXiv 2312.03732).
        dora: Learn the length of attention's and MLP's output rows apart from their direction (arXiv 2402.09353).
        init: `default` (A random, B zero), `gaussian` (A normal), or `loftq` (both start at the error of the 4-bit
            base, arXiv 2310.08659).
        selection: Experts that get LoRA; None for all.
        tune_router: Train the router's weights as they are and save them with the adapter.
        tune_norms: The same for the LayerNorms.
        tune_biases: The same for every bias; of the experts', those of the selection.
    """

    attention_rank: int | None = None
    mlp_rank: int | None = None
    expert_rank: int | None = None
    router_rank: int | None = None
    alpha: float = 32.0
    dropout: float = 0.0
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropouts: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    selection: Selection | None = None
    tune_router: bool = False
    tune_norms: bool = False
    tune_biases: bool = False

    def ranks(self) -> dict[str, int]:
        """Rank of each group that has LoRA."""
        given = {
            "attention": self.attention_rank,
            "mlp": self.mlp_rank,
            "experts": self.expert_rank,
            "router": self.router_rank,
        }
        return {group: rank for group, rank in given.items() if rank is not None}

    def dropout_of(self, group: str) -> float:
        return self.dropouts.get(group, self.dropout)


def lora_config(settings: AdapterSettings) -> "LoraConfig":
    """PEFT's config for these settings. (`attach` does what it has no place for: dropout by group, selection, biases.)

    Raises:
        UserError: If nothing would be trained, or two settings contradict each other.
    """
    # Here, so that planning does without PEFT.
    from peft import LoraConfig

    ranks = settings.ranks()
    trained_modules = [ROUTER_MODULE] * settings.tune_router + list(NORM_MODULES) * settings.tune_norms
    if not ranks and not trained_modules and not settings.tune_biases:
        raise UserError("Nothing would be trained: give at least one of attention, mlp and experts a rank.")
    if settings.tune_router and settings.router_rank is not None:
        raise UserError("The router is either tuned or has LoRA, not both.")
    if settings.dora and settings.router_rank is not None:
        raise UserError("DoRA acts on attention and mlp alone, and the router has LoRA. Leave out one of the two.")
    if settings.init not in INITS:
        raise UserError(f"init '{settings.init}' is not known; use one of {', '.join(INITS)}.")
    alphas = {group: settings.alphas.get(group, settings.alpha) for group in ranks}
    # The experts' values are the common ones: PEFT warns of a pattern that names a parameter, though it follows it.
    common = "experts" if "experts" in ranks else next(iter(ranks), "")
    common_rank, common_alpha = ranks.get(common, 1), alphas.get(common, settings.alpha)
    targets = {target: group for group in ranks for target in GROUPS[group]}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=common_rank,
        lora_alpha=common_alpha,
        rank_pattern={target: ranks[group] for target, group in targets.items() if ranks[group] != common_rank},
        alpha_pattern={target: alphas[group] for target, group in targets.items() if alphas[group] != common_alpha},
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        target_modules=linear_targets(targets),
        target_parameters=[target for target in targets if target in EXPERT_TARGETS] or None,
        modules_to_save=trained_modules or None,
    )


def linear_targets(targets: Mapping[str, object]) -> list[str] | str:
    """PEFT's `target_modules`; a name of PEFT's that matches nothing where no linear layer has LoRA."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return sorted(target for target in targets if target not in EXPERT_TARGETS) if targets else DUMMY_TARGET_MODULES
