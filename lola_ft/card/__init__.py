"""The model card: the README of a run, and of what is published."""

from lola_ft.card.facts import CardFacts
from lola_ft.card.render import render_card

__all__ = ["CardFacts", "render_card"]
