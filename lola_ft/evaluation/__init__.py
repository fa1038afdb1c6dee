"""Evaluation: what models can do, language by language, side by side."""

from lola_ft.evaluation.comparison import Comparison, compare
from lola_ft.evaluation.exact_match import ExactMatch, best_constant_answer, exact_match_by_language

__all__ = ["Comparison", "ExactMatch", "best_constant_answer", "compare", "exact_match_by_language"]
