"""What is needed for a moment, beside what is kept: estimates, each from the code that allocates it.

Letters: T tokens, D hidden, F inner, V vocabulary, E experts, R rank.
"""

from lola_ft.kernels.nf4_sizes import BLOCK
from lola_ft.planning.activations import attended, grouped_rows
from lola_ft.planning.job import Job

_FLOAT = 4
_CHUNK_ROWS = 256  # of the loss: `kernels/loss.py`
_CPU_TILE = 1 << 20  # numbers that are made dense at a time on a CPU: `quantization/nf4.py`


def loss_work(job: Job) -> int:
    """The labelled rows, and one chunk's logits with their softmax and gradient."""
    config = job.config
    logits = min(_CHUNK_ROWS, job.tokens) * config.vocab_size
    rows = job.tokens * config.n_embd * (_FLOAT if job.on_cuda else job.width)
    return rows + logits * (2 * _FLOAT + (job.width if job.width < _FLOAT else 0))


def backward_work(job: Job) -> int:
    """The largest of a layer's parts on the way back, with the gradient that flows along."""
    config = job.config
    row = job.tokens * config.n_embd
    stream = 2 * row * (_FLOAT if job.on_cuda else job.width)
    attention = 4 * row * job.width
    if config.attn_pdrop and not job.on_cuda:
        length, batch = attended(job)
        attention += round(2 * batch * config.n_head * length**2) * job.width
    mlp = 3 * job.tokens * config.n_inner * job.width
    return stream + max(attention + linear_tile(job), mlp + linear_tile(job), _experts_work(job))


def linear_tile(job: Job) -> int:
    """What of the largest linear layer's 4-bit weight is dense at a time: all of it; on a CPU in float32 a tile."""
    if job.quantization != "nf4":
        return 0
    config = job.config
    numbers = config.n_embd * max(config.n_inner, 3 * config.n_embd)
    if not job.on_cuda and job.width == _FLOAT:
        return min(numbers, _CPU_TILE) * _FLOAT + _scales(numbers)
    return numbers * (_FLOAT if job.settings.dora else job.width) + _scales(numbers)


def _experts_work(job: Job) -> int:
    """Gradients of grouped rows and of LoRA's factors; copies of the inner rows; what is dense of the weights.

    A CPU makes one expert's weight dense at a time; a GPU all, if it finds that faster than decoding on the way.
    """
    config, rank = job.config, job.settings.expert_rank or 0
    hidden, inner = config.n_embd, config.n_inner
    factors = config.num_experts * 2 * rank * (hidden + inner) * (job.width + _FLOAT)
    rows = grouped_rows(job) * (3 * hidden + 4 * inner) * job.width
    if not job.on_cuda:
        return rows + factors + linear_tile(job)
    weights = config.num_experts * hidden * inner if job.quantization == "nf4" else 0
    return rows + factors + weights * job.width + _scales(weights)


def _scales(numbers: int) -> int:
    return -(-numbers // BLOCK) * _FLOAT
