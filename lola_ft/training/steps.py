"""How many optimiser steps a run takes."""

import math

from lola_ft.recipe import Recipe


def estimate_steps(recipe: Recipe, tokens: int, sequences: int) -> int:
    """Optimiser steps of the run; packing is taken to be perfect.

    Args:
        tokens, sequences: Of one epoch of the training data.
    """
    train = recipe.train
    if train.max_steps:
        return train.max_steps
    rows = math.ceil(tokens / recipe.data.max_length) if recipe.data.packing else sequences
    return max(1, math.ceil(rows / (train.micro_batch_size * train.grad_accum_steps) * train.epochs))
