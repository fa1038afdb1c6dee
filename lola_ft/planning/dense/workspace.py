"""What a dense layer needs for a moment on its way back: estimates, from the code that allocates it."""

from lola_ft.planning.job import Job
from lola_ft.planning.workspace import linear_tile

_FLOAT = 4
_ACTIVATION_STEPS = 5  # GPT-2's and BLOOM's GELUs go back step by step


def dense_backward_work(job: Job) -> int:
    """The larger of a layer's two parts, with the gradient that flows along."""
    config = job.config
    row = job.tokens * config.n_embd
    stream = 2 * row * (_FLOAT if job.on_cuda else job.width)
    attention = 4 * row * job.width + _SCORES[config.family.name](job)
    mlp = _ACTIVATION_STEPS * job.tokens * config.n_inner * job.width
    return stream + max(attention, mlp) + linear_tile(job)


def _gpt2_scores(job: Job) -> int:
    """None of a fused attention; with dropout a CPU has no such."""
    if job.on_cuda or not job.config.attn_pdrop:
        return 0
    length, batch = (job.tokens, 1) if job.packing else (job.length, job.sequences)
    return 2 * batch * job.config.n_head * length**2 * _FLOAT


def _bloom_scores(job: Job) -> int:
    """The gradients of the probabilities in both dtypes, and that of the scores."""
    return job.sequences * job.config.n_head * job.length**2 * (2 * _FLOAT + job.width)


_SCORES = {"gpt2": _gpt2_scores, "bloom": _bloom_scores}
