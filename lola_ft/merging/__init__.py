"""Merging an adapter back into the weights, with proof."""

from lola_ft.merging.merge import merge
from lola_ft.merging.merge_report import MergeReport

__all__ = ["MergeReport", "merge"]
