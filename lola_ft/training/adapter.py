"""A recipe's adapter and router sections as plain settings."""

from lola_ft.adapters import AdapterSettings
from lola_ft.adapters.selection import read_selection
from lola_ft.recipe import Recipe


def adapter_settings(recipe: Recipe) -> AdapterSettings:
    """What the recipe trains.

    Raises:
        UserError: If the file that selects experts cannot be read.
    """
    adapter, router = recipe.adapter, recipe.router
    groups = {"attention": adapter.attention, "mlp": adapter.mlp, "experts": adapter.experts}
    given = {name: group for name, group in groups.items() if group is not None}
    ranks = {name: group.rank for name, group in given.items()}
    return AdapterSettings(
        attention_rank=ranks.get("attention"),
        mlp_rank=ranks.get("mlp"),
        expert_rank=ranks.get("experts"),
        router_rank=router.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        alphas={name: group.alpha for name, group in given.items() if group.alpha is not None},
        dropouts={name: group.dropout for name, group in given.items() if group.dropout is not None},
        rslora=adapter.variant == "rslora",
        dora=adapter.variant == "dora",
        init=adapter.init,
        selection=read_selection(adapter.experts.select) if adapter.experts else None,
        tune_router=router.mode == "tuned",
        tune_norms=adapter.norms,
        tune_biases=adapter.biases,
    )
