"""How long a sequence may be: the recipe's wish within the base's positions."""

from typing import Any

from rich.console import Console

from lola_ft.errors import UserError
from lola_ft.recipe import Recipe


def fit_length(recipe: Recipe, config: Any, console: Console) -> Recipe:
    """Hold sequences to the base's positions: an error if the recipe asks for more, a note if only the default does."""
    wanted, most = recipe.data.max_length, config.n_positions
    if wanted <= most:
        return recipe
    if "max_length" in recipe.data.model_fields_set:
        raise UserError(
            f"data.max_length: {wanted} is more than the {most} learned positions of {recipe.base.model}. "
            f"Set data.max_length={most} or less."
        )
    console.print(f"Sequences are at most {most} tokens long: {recipe.base.model} has no more positions.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": most})})
