"""Which of an adapter's settings a dense base takes. (Apart from what attaches one: planning does without PEFT.)"""

from lola_ft.adapters import AdapterSettings
from lola_ft.errors import UserError


def check_settings(settings: AdapterSettings, model_type: str) -> None:
    """Refuse what only LOLA has, or what is done for LOLA alone.

    Raises:
        UserError: Naming every such setting.
    """
    refused = {
        "adapter.experts": settings.expert_rank is not None,
        "router.mode": settings.tune_router or settings.router_rank is not None,
    }
    if wrong := [key for key, given in refused.items() if given]:
        raise UserError(
            f"{' and '.join(wrong)}: the base is a dense model ({model_type}), which has no experts and no router. "
            "Leave them out: a baseline has LoRA on attention and mlp."
        )
    alone = {
        "adapter.norms": settings.tune_norms,
        "adapter.biases": settings.tune_biases,
        "adapter.variant: dora": settings.dora,
        "adapter.init: loftq": settings.init == "loftq",
    }
    if wrong := [key for key, given in alone.items() if given]:
        raise UserError(
            f"{' and '.join(wrong)}: for LOLA alone; the base is a dense model ({model_type}). Leave them out."
        )
