"""Recipes: the YAML files that describe runs."""

from lola_ft.recipe.loader import load_recipe, render_recipe
from lola_ft.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "render_recipe"]
