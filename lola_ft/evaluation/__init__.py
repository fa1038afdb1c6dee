"""Evaluation: measure models on held-out rows or benchmarks, by language, and compare them."""

from lola_ft.evaluation.comparison import Comparison, compare
from lola_ft.evaluation.exact_match import ExactMatch, best_constant_answer, exact_match_by_language

__all__ = ["Comparison", "ExactMatch", "best_constant_answer", "compare", "exact_match_by_language"]
