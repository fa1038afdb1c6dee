"""Recipes: the one file that says what a run does."""

from lola_ft.recipe.loader import load_recipe, render_recipe
from lola_ft.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "render_recipe"]
