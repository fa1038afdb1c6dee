"""Merging an adapter back into the weights, with proof."""

from lola_ft.merging.merge import MergeReport, merge

__all__ = ["MergeReport", "merge"]
