"""The model card: the README of a run and of a published model."""

from lola_ft.card.facts import CardFacts
from lola_ft.card.render import render_card
from lola_ft.card.terms import BaseTerms, read_terms

__all__ = ["BaseTerms", "CardFacts", "read_terms", "render_card"]
