"""A recipe that continues an adapter: the adapter decides what is trained, and the recipe's own keys must agree."""

from typing import Any

from lola_ft.adapters.selection import Selection, read_selection
from lola_ft.adapters.settings import AdapterSettings
from lola_ft.errors import UserError
from lola_ft.recipe import Recipe
from lola_ft.recipe.schema import ExpertLora, GroupLora

_GROUPS = ("attention", "mlp", "shared_experts", "experts")
_OWN = ("variant", "init", "norms", "biases")
_ROUTER = ("mode", "rank")


def continued(recipe: Recipe, settings: AdapterSettings, num_experts: int, special_tokens: list[str]) -> Recipe:
    """Return the recipe with the adapter's settings for keys that the recipe leaves out. Dropout stays the recipe's.

    Args:
        settings: The adapter's settings.
        num_experts: Number of experts per MoE layer.
        special_tokens: Tokens whose rows the adapter has trained.

    Raises:
        UserError: Keys in the recipe differ from the adapter; the message names them with both values.
    """
    filled = _Filled(recipe, settings, num_experts)
    groups = {group: filled.group(group) for group in _GROUPS}
    adapter = {"alpha": filled.alpha, **groups, **filled.own_keys()}
    router = filled.router_keys()
    if "special_tokens" in recipe.data.model_fields_set:
        given = ", ".join(sorted(set(recipe.data.special_tokens))) or "none"
        filled.compare("data.special_tokens", given, ", ".join(sorted(special_tokens)) or "none")
    if filled.differences:
        lines = "\n".join(f"  {line}" for line in filled.differences)
        raise UserError(
            f"adapter.continue_from: {recipe.adapter.continue_from} was trained with other settings.\n{lines}\n"
            "The adapter decides what is trained. Remove these keys."
        )
    if settings.init == "loftq" and recipe.base.quantization == "none":
        raise UserError(
            f"base.quantization: {recipe.adapter.continue_from} started at the rounding error of the 4-bit base (init "
            "loftq) and corrects it; on unrounded weights it would be wrong. Set base.quantization=nf4."
        )
    changed = {
        "adapter": recipe.adapter.model_copy(update=adapter),
        "router": recipe.router.model_copy(update=router),
        "data": recipe.data.model_copy(update={"special_tokens": special_tokens}),
    }
    return recipe.model_copy(update=changed)


def keys_left_out(recipe: Recipe) -> list[str]:
    """List the keys that a recipe leaves to the adapter that it continues."""
    adapter, given = recipe.adapter, recipe.adapter.model_fields_set
    keys = [f"adapter.{key}" for key in (*_GROUPS, *_OWN, "alpha") if key not in given]
    keys += ["data.special_tokens"] if "special_tokens" not in recipe.data.model_fields_set else []
    keys += [f"router.{key}" for key in _ROUTER if key not in recipe.router.model_fields_set]
    for name in _GROUPS:
        group = getattr(adapter, name)
        if isinstance(group, GroupLora):
            keys += [f"adapter.{name}.{key}" for key in ("alpha", "select") if key not in group.model_fields_set]
    return keys


class _Filled:
    """Combines a recipe's sections with an adapter's settings, and collects the differences."""

    def __init__(self, recipe: Recipe, settings: AdapterSettings, num_experts: int) -> None:
        self.adapter, self.router = recipe.adapter, recipe.router
        self.settings, self.num_experts = settings, num_experts
        self.ranks = settings.ranks()
        self.differences = list[str]()
        self.alpha_given = "alpha" in self.adapter.model_fields_set
        self.alpha = self.adapter.alpha if self.alpha_given else settings.alpha
        if "router" in self.ranks:
            self.compare("adapter.alpha", self.alpha, settings.alphas["router"])

    def compare(self, key: str, given: Any, held: Any) -> None:
        if given != held:
            self.differences.append(f"{key}: {_shown(given)} in the recipe, {_shown(held)} in the adapter")

    def group(self, name: str) -> GroupLora | None:
        """Return a group's section: the recipe's if given, else the adapter's."""
        rank, given = self.ranks.get(name), getattr(self.adapter, name)
        if name not in self.adapter.model_fields_set:
            return None if rank is None else self._new_group(name, rank)
        if given is None or rank is None:
            self.compare(f"adapter.{name}", given and f"rank {given.rank}", rank and f"rank {rank}")
            return None
        self.compare(f"adapter.{name}.rank", given.rank, rank)
        changes: dict[str, Any] = {}
        if given.alpha is not None:
            self.compare(f"adapter.{name}.alpha", given.alpha, self.settings.alphas[name])
        else:
            changes["alpha"] = self._own_alpha(name)
        if isinstance(given, ExpertLora):
            changes |= self._select(given)
        return given.model_copy(update=changes)

    def _new_group(self, name: str, rank: int) -> GroupLora:
        alpha = self._own_alpha(name)
        if name != "experts":
            return GroupLora(rank=rank, alpha=alpha)
        return ExpertLora(rank=rank, alpha=alpha, select=_as_lists(self.settings.selection))

    def _own_alpha(self, name: str) -> float | None:
        """Return a group's alpha if it differs from the common alpha, which the recipe then must not set."""
        held = self.settings.alphas[name]
        if held == self.alpha:
            return None
        if self.alpha_given:
            self.compare("adapter.alpha", self.alpha, f"{held} for {name}")
        return held

    def _select(self, given: ExpertLora) -> dict[str, Any]:
        if "select" not in given.model_fields_set:
            return {"select": _as_lists(self.settings.selection)}
        chosen, held = read_selection(given.select), self.settings.selection
        if chosen is not None and all(len(set(ids)) == self.num_experts for ids in chosen):
            chosen = None
        if chosen != held:
            self.compare("adapter.experts.select", _counts(chosen), f"{_counts(held)}, others")
        return {}

    def own_keys(self) -> dict[str, Any]:
        """Return the adapter section's settings outside the groups."""
        held = self.settings
        variant = "dora" if held.dora else "rslora" if held.rslora else "lora"
        values = {"variant": variant, "init": held.init, "norms": held.tune_norms, "biases": held.tune_biases}
        return self._taken(self.adapter, "adapter", values)

    def router_keys(self) -> dict[str, Any]:
        """Return the router section's settings: mode and rank."""
        rank = self.settings.router_rank
        mode = "lora" if rank is not None else "tuned" if self.settings.tune_router else "frozen"
        return self._taken(self.router, "router", {"mode": mode, "rank": rank})

    def _taken(self, section: Any, name: str, values: dict[str, Any]) -> dict[str, Any]:
        for key, held in values.items():
            if key in section.model_fields_set:
                self.compare(f"{name}.{key}", getattr(section, key), held)
        return values


def _as_lists(selection: Selection | None) -> str | list[list[int]]:
    return "all" if selection is None else [list(ids) for ids in selection]


def _counts(selection: Selection | None) -> str:
    return "all" if selection is None else f"{sum(map(len, selection))} experts of {len(selection)} layers"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
