"""Generation: what a model answers, one prompt streamed or many at a time."""

from lola_ft.generation.answers import Answer, Sampling, answer_all, answer_in_order, answer_one, check_room

__all__ = ["Answer", "Sampling", "answer_all", "answer_in_order", "answer_one", "check_room"]
