"""A recipe held to what its base can do: all of it for LOLA, less for a dense baseline."""

from typing import Any

from rich.console import Console

from lola_ft.baseline.families import FAMILIES
from lola_ft.baseline.settings import check_settings
from lola_ft.errors import UserError
from lola_ft.recipe import Recipe
from lola_ft.training.adapter import adapter_settings


def fit_base(recipe: Recipe, config: Any, console: Console) -> Recipe:
    """The recipe; of a BLOOM without packing, which is an error if the recipe asks for it.

    Raises:
        UserError: The base is dense, and the recipe asks for what only LOLA has.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        return recipe
    check_settings(adapter_settings(recipe), family.name)
    if losses := [key for key in ("aux_loss", "z_loss") if getattr(recipe.router, key)]:
        raise UserError(
            f"router.{losses[0]}: the base is a dense model ({family.name}), which has no router. Remove it."
        )
    if recipe.hub:
        raise UserError(f"hub: what is published is LOLA's; the base is a dense model ({family.name}). Remove it.")
    if family.packs or not recipe.data.packing:
        return recipe
    reason = f"the attention of {family.name} models (transformers') does not keep packed rows apart"
    if "packing" in recipe.data.model_fields_set:
        raise UserError(f"data.packing: {reason}. Set data.packing=false.")
    console.print(f"Rows are not packed: {reason}.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})
