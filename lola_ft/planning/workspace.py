"""What is needed for a moment, beside what is kept: estimates, each from the code that allocates it.

Letters: T tokens, D hidden, F inner, V vocabulary, E experts, R rank.
"""

from lola_ft.kernels.nf4_sizes import BLOCK
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
        length, batch = (job.tokens, 1) if job.packing else (job.length, job.micro_batch_size)
        attention += 2 * batch * config.n_head * length**2 * job.width
    mlp = 3 * job.tokens * config.n_inner * job.width
    return stream + dense_tile(job) + max(attention, mlp, _experts_work(job))


def dense_tile(job: Job) -> int:
    """What of a 4-bit weight is dense at a time: all of the largest one; on a CPU in float32 a tile."""
    if job.quantization != "nf4":
        return 0
    config = job.config
    numbers = config.n_embd * max(config.n_inner, 3 * config.n_embd)
    scales = -(-numbers // BLOCK) * _FLOAT
    if not job.on_cuda and job.width == _FLOAT:
        return min(numbers, _CPU_TILE) * _FLOAT + scales
    return numbers * (_FLOAT if job.settings.dora else job.width) + scales


def _experts_work(job: Job) -> int:
    """Gradients of grouped rows, four arrays of one expert's rows (it may have half of all tokens), of LoRA's factors."""
    config, rank = job.config, job.settings.expert_rank or 0
    rows = 3 * job.tokens * config.n_embd + 4 * (job.tokens // 2) * config.n_inner
    factors = config.num_experts * 2 * rank * (config.n_embd + config.n_inner)
    return rows * job.width + factors * (job.width + _FLOAT)
