"""What a dense layer needs for a moment on its way back: estimates, from the code that allocates it.

What is saved goes as it is used, so that a step of the way back often takes the place of one of the way there.
"""

from lola_ft.planning.dense.activations import whole_rows
from lola_ft.planning.job import Job
from lola_ft.planning.workspace import linear_tile

_FLOAT = 4


def dense_backward_work(job: Job) -> int:
    """The larger of a layer's two parts, with the gradient that flows along."""
    row = job.tokens * job.config.n_embd
    stream = 2 * row * (_FLOAT if job.on_cuda else job.width)
    scores, activation = _INSIDE[job.config.family.name](job)
    return stream + max(4 * row * job.width + scores, activation) + linear_tile(job)


def _gpt2_inside(job: Job) -> tuple[int, int]:
    """A fused attention has no scores; a CPU has none with dropout. GELU's steps free what they were kept for."""
    config, scores = job.config, 0
    if config.attn_pdrop and not job.on_cuda:
        length, batch = whole_rows(job)
        scores = batch * config.n_head * length**2 * _FLOAT
    return scores, job.tokens * config.n_inner * (_FLOAT if job.on_cuda else job.width)


def _bloom_inside(job: Job) -> tuple[int, int]:
    """The gradients of probabilities, in float32, and of scores; GELU's way back is computed in steps."""
    scores = job.sequences * job.config.n_head * job.length**2
    return scores * (_FLOAT + job.width), 4 * job.tokens * job.config.n_inner * job.width


_INSIDE = {"gpt2": _gpt2_inside, "bloom": _bloom_inside}
