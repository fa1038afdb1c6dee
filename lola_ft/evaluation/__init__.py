"""Evaluation: what a model can do, language by language."""

from lola_ft.evaluation.exact_match import ExactMatch, best_constant_answer, exact_match_by_language

__all__ = ["ExactMatch", "best_constant_answer", "exact_match_by_language"]
