"""The work space: memory needed only for a moment. Each estimate follows the code that allocates the memory.

Letters: T tokens, D hidden, F inner, V vocabulary, E experts, R rank.
"""

import torch
from transformers.activations import ACT2FN

from lola_ft.kernels.nf4_sizes import BLOCK
from lola_ft.planning.attention_memory import is_stepwise, score_numbers
from lola_ft.planning.job import Job
from lola_ft.planning.saved_for_backward import expert_factors, expert_inputs, grouped_rows

_FLOAT = 4
_CHUNK_ROWS = 256  # rows per chunk of the loss (`kernels/loss.py`)
_CPU_TILE = 1 << 20  # numbers that are dequantised at a time on a CPU (`quantization/nf4.py`)


def loss_work(job: Job) -> int:
    """Return the bytes of the labelled rows (T, D), and of one chunk's logits with their softmax and gradient."""
    sizes = job.architecture.sizes
    logits = min(_CHUNK_ROWS, job.tokens) * sizes.vocab
    rows = job.tokens * sizes.hidden * (_FLOAT if job.on_cuda else job.width)
    return rows + logits * (2 * _FLOAT + (job.width if job.half else 0))


def backward_work(job: Job) -> int:
    """Return the bytes of a layer's largest part in the backward pass, with the gradient of the hidden states."""
    row = job.tokens * job.architecture.sizes.hidden
    # Gradients of the hidden states (T, D) after the part and before it.
    stream = 2 * row * (_FLOAT if job.on_cuda else job.width)
    # Gradients of queries, keys, values and the output (T, D).
    attention = 4 * row * job.width + _scores_work(job)
    # Attention, MLP and experts come one after another, so only the largest counts.
    parts = max(attention, _activation_work(job)) + linear_tile(job)
    return stream + max(parts, _experts_work(job) if job.architecture.sizes.moe_layers else 0)


def linear_tile(job: Job) -> int:
    """Return the bytes of the largest dequantised weight: all of it or, on a CPU in float32, one tile."""
    if job.quantization != "nf4":
        return 0
    architecture = job.architecture
    numbers = max(size_out * size_in for pairs in architecture.matrices.values() for size_out, size_in in pairs)
    numbers = max(numbers, architecture.sizes.hidden * architecture.sizes.expert_inner)
    if not job.on_cuda and job.width == _FLOAT:
        return min(numbers, _CPU_TILE) * _FLOAT + _scales(numbers)
    return numbers * (_FLOAT if job.settings.dora else job.width) + _scales(numbers)


def _scores_work(job: Job) -> int:
    """Return the bytes of the gradients of attention scores and, if not fused, of float32 probabilities."""
    if job.architecture.family.attention == "scores":
        return score_numbers(job) * (_FLOAT + job.width)
    return score_numbers(job) * _FLOAT if is_stepwise(job) else 0


def _activation_work(job: Job) -> int:
    """Return the bytes of an activation's gradient. A model's own function computes it in several steps."""
    numbers = job.tokens * job.architecture.sizes.inner
    if job.architecture.sizes.activation in ACT2FN:
        return numbers * (_FLOAT if job.on_cuda else job.width)
    return 4 * numbers * job.width


def _experts_work(job: Job) -> int:
    """Return the bytes of gradients of grouped rows and LoRA factors, copies of inner rows, and dequantised weights.

    On a CPU each thread dequantises one expert's weight at a time. A GPU may dequantise all experts at once, if that is
    faster than dequantising inside the kernel.
    """
    sizes, inputs = job.architecture.sizes, expert_inputs(job)
    hidden, inner = sizes.hidden, sizes.expert_inner
    factors = sizes.num_experts * expert_factors(job, job.settings.expert_rank or 0) * (job.width + _FLOAT)
    rows = grouped_rows(job) * (3 * hidden + (2 + 2 * inputs) * inner) * job.width
    if not job.on_cuda:
        return rows + factors + torch.get_num_threads() * linear_tile(job)
    weights = sizes.num_experts * hidden * inner * inputs if job.quantization == "nf4" else 0
    return rows + factors + weights * job.width + _scales(weights)


def _scales(numbers: int) -> int:
    return -(-numbers // BLOCK) * _FLOAT
