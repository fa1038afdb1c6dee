"""How many optimiser steps a run takes."""

import math

from lola_ft.recipe import Recipe


def estimate_steps(recipe: Recipe, tokens: int, sequences: int, processes: int = 1) -> int:
    """Optimiser steps of the run; packing is taken to be perfect.

    Args:
        tokens, sequences: Of one epoch of the training data.
        processes: Each does its own micro batches.
    """
    train = recipe.train
    if train.max_steps:
        return train.max_steps
    rows = math.ceil(tokens / recipe.data.max_length) if recipe.data.packing else sequences
    rows_a_step = train.micro_batch_size * train.grad_accum_steps * processes
    return max(1, math.ceil(rows / rows_a_step * train.epochs))
