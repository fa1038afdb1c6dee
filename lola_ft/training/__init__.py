"""Training: a recipe in, a run folder out."""

from lola_ft.training.run import train

__all__ = ["train"]
