"""Callbacks of the trainer: guards, the stop request, the trial of the longest batch, progress, memory and energy."""
