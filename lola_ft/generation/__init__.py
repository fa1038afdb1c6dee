"""Generation: a model's answers, to one prompt as a stream or to many prompts in batches."""

from lola_ft.generation.answers import Answer, Sampling, answer_all, answer_in_order, answer_one, check_room

__all__ = ["Answer", "Sampling", "answer_all", "answer_in_order", "answer_one", "check_room"]
