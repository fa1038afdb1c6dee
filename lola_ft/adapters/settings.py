"""The settings of an adapter, without types of other libraries, and PEFT's config for them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lola_ft.adapters.selection import Selection
from lola_ft.errors import UserError
from lola_ft.families import Architecture, Family

if TYPE_CHECKING:
    from peft import LoraConfig

INITS = ("default", "gaussian", "loftq")


@dataclass(frozen=True)
class AdapterSettings:
    """The choice of weights that an adapter trains, and how.

    Attributes:
        attention_rank, mlp_rank, shared_rank, expert_rank, router_rank: LoRA rank of each group; None leaves the group
            out.
        alpha: The update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`).
        dropout: Probability of dropping an input of the side path.
        alphas, dropouts: Values of single groups (attention, mlp, shared_experts, experts, router), instead of the
            common ones.
        rslora: Scale by alpha / sqrt(rank) (arXiv 2312.03732).
        dora: Learn the length of the output rows of attention and MLP separately from their direction (arXiv
            2402.09353).
        init: `default` (A random, B zero), `gaussian` (A normal), or `loftq` (both start at the error of the 4-bit
            base, arXiv 2310.08659).
        selection: Experts that get LoRA; None for all.
        tune_router: Fully train the router's weights (no LoRA) and save them with the adapter.
        tune_norms: Fully train the norms (no LoRA).
        tune_biases: Fully train every bias (no LoRA); for experts, only those of the selected experts.
        token_ids: Tokens whose rows are trained: in the embeddings, and in the output head if it is not tied to them.
    """

    attention_rank: int | None = None
    mlp_rank: int | None = None
    shared_rank: int | None = None
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
    token_ids: tuple[int, ...] = ()

    def ranks(self) -> dict[str, int]:
        """Return the rank of each group that has LoRA."""
        given = {
            "attention": self.attention_rank,
            "mlp": self.mlp_rank,
            "shared_experts": self.shared_rank,
            "experts": self.expert_rank,
            "router": self.router_rank,
        }
        return {group: rank for group, rank in given.items() if rank is not None}

    def wanted(self) -> dict[str, str]:
        """Return the feature of a family that each recipe key in use needs."""
        keys = {
            "adapter.attention": ("attention", self.attention_rank is not None),
            "adapter.mlp": ("mlp", self.mlp_rank is not None),
            "adapter.shared_experts": ("shared_experts", self.shared_rank is not None),
            "adapter.experts": ("experts", self.expert_rank is not None),
            "router.mode": ("router", self.tune_router or self.router_rank is not None),
            "adapter.norms": ("norms", self.tune_norms),
            "adapter.biases": ("biases", self.tune_biases),
        }
        return {key: feature for key, (feature, given) in keys.items() if given}

    def dropout_of(self, group: str) -> float:
        return self.dropouts.get(group, self.dropout)

    def dropout_by_target(self, family: Family) -> dict[str, float]:
        """Return the dropout of each target, by PEFT's name of the target."""
        return {target: self.dropout_of(group) for group in self.ranks() for target in family.lora_groups[group]}


def lora_config(settings: AdapterSettings, architecture: Architecture) -> "LoraConfig":
    """Return PEFT's config for the settings. Dropout by group, selection and biases, which it lacks, are for `attach`.

    Raises:
        UserError: If the family lacks a group, nothing would be trained, or two settings contradict each other.
    """
    # Imported late, so that planning does not import PEFT.
    from peft import LoraConfig

    family, ranks = architecture.family, settings.ranks()
    architecture.require(settings.wanted())
    trained_modules = [*architecture.router_modules] * settings.tune_router
    trained_modules += [*architecture.norm_modules] * settings.tune_norms
    if not ranks and not trained_modules and not settings.tune_biases and not settings.token_ids:
        raise UserError("Nothing would be trained: give at least one of attention, mlp and experts a rank.")
    if settings.tune_router and settings.router_rank is not None:
        raise UserError("The router is either tuned or has LoRA, not both.")
    if settings.dora and settings.router_rank is not None:
        raise UserError("DoRA acts only on attention and mlp, and the router has LoRA. Leave out one of the two.")
    if settings.init not in INITS:
        raise UserError(f"init '{settings.init}' is not known; use one of {', '.join(INITS)}.")
    alphas = {group: settings.alphas.get(group, settings.alpha) for group in ranks}
    # The experts' values are the common ones, because PEFT warns of patterns that name a parameter.
    common = "experts" if "experts" in ranks else next(iter(ranks), "")
    common_rank, common_alpha = ranks.get(common, 1), alphas.get(common, settings.alpha)
    targets = {target: group for group in ranks for target in family.lora_groups[group]}
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
        target_modules=linear_targets(targets, family),
        target_parameters=[target for target in targets if target in family.parameter_targets] or None,
        modules_to_save=trained_modules or None,
        trainable_token_indices={name: list(settings.token_ids) for name in token_modules(architecture)}
        if settings.token_ids
        else None,
    )


def token_modules(architecture: Architecture) -> dict[str, str]:
    """Return the Hub names of the weights whose rows belong to tokens, by PEFT's names of their modules.

    An output head that is tied to the embeddings shares their rows and is left out.
    """
    return {name.split(".")[-2]: name for name in architecture.family.embeddings if name in architecture.places}


def linear_targets(targets: Collection[str], family: Family) -> list[str] | str:
    """Return PEFT's `target_modules`. Without LoRA on linear layers it is PEFT's name that matches no module."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    parameters = (*family.parameter_targets, *(target for target in targets if target.endswith(".weight")))
    linear = sorted(target for target in targets if target not in parameters)
    return linear if targets else DUMMY_TARGET_MODULES
