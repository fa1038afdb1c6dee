"""Callbacks beside the trainer: guards, the stop request, the trial of the longest batch, progress, memory, energy."""
