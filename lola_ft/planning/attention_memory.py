"""Attention's share of the memory, between its linear layers, by the kind that a family's table names.

`fused` is PyTorch's `scaled_dot_product_attention`: it holds no scores, but on a CPU with dropout, where it is computed
step by step in float32. `stretches` is the same, on packed documents a stretch at a time (`model/packed.py`), and in
bfloat16 on a CPU by `kernels/attention.py`. `scores` computes every score, with a mask of numbers. `latent` has queries
and keys wider than its values: fused on a GPU, step by step in float32 on a CPU.

Letters: T tokens, H heads, S length of a sequence.
"""

from lola_ft.kernels.attention import LONGEST
from lola_ft.model.packed import TOKENS
from lola_ft.planning.job import Job

_FLOAT = 4


def attended(job: Job) -> tuple[int, float]:
    """Return the most tokens that attend to one another, and how often a micro batch has so many.

    These are rows or, of packed rows, all of them at once or stretches of whole documents.
    """
    if not job.packing:
        return job.length, job.sequences
    by_stretch = job.architecture.family.attention == "stretches"
    length = min(job.tokens, TOKENS.get(job.device, job.tokens)) if by_stretch else job.tokens
    return length, job.tokens / length


def score_numbers(job: Job) -> int:
    """Return how many scores a layer has (H, S, S)."""
    length, count = attended(job)
    return round(count * job.sizes.heads * length**2)


def mask_numbers(job: Job) -> int:
    """Return the size of the mask that all layers share; a single unpacked row needs none where attention is fused."""
    length, count = attended(job)
    needed = job.packing or count > 1 or job.architecture.family.attention == "scores"
    return round(count * length**2) if needed else 0


def mask_bytes(job: Job) -> int:
    """Return the same in bytes: truth values where attention is fused, else numbers."""
    return mask_numbers(job) * (job.width if job.architecture.family.attention == "scores" else 1)


def kept_inside(job: Job, size: int) -> tuple[int, bool]:
    """Return the bytes that attention keeps for backward, and whether the output projection's input is among them.

    Args:
        size: Values per token of a query, all heads together.
    """
    sizes, row = job.sizes, job.tokens * size
    if job.architecture.family.attention == "scores":
        scores = score_numbers(job)
        kept = 3 * row * job.width + scores * _FLOAT  # softmax is float32
        if sizes.attention_dropout:
            kept += scores * (1 if job.on_cuda else job.width)
        if sizes.attention_dropout or job.half:  # what is multiplied with the values is another tensor
            kept += scores * job.width
        return kept, False
    if is_stepwise(job):
        rows = 5 if (job.packing or job.sequences == 1) and not job.half else 3  # a single row's values are not copied
        return (rows * row + 3 * score_numbers(job)) * _FLOAT, False
    kept = 4 * row * job.width + job.tokens * sizes.heads * _FLOAT
    if not _takes_mask_as_it_is(job):
        kept += mask_numbers(job) * job.width
    return kept, True


def kept_inside_latent(job: Job, query: int, value: int, wide: int) -> tuple[int, bool]:
    """Return the same of latent attention.

    Args:
        query, value: Values per token of a query and of a value, all heads together.
        wide: Of the layer that gives keys and values: values stay a view of its output unless they are cast.
    """
    tokens, sizes = job.tokens, job.sizes
    if job.on_cuda:
        kept = tokens * (2 * query + wide + value) * job.width + tokens * sizes.heads * _FLOAT
        return kept + mask_numbers(job) * job.width, True
    scores = score_numbers(job) * (3 if sizes.attention_dropout else 1)
    return (tokens * (2 * query + (value if job.half else wide)) + scores) * _FLOAT, False


def is_stepwise(job: Job) -> bool:
    """Whether fused attention is computed step by step, with its scores in memory: on a CPU, with dropout or latent."""
    attention = job.architecture.family.attention
    dropout = bool(job.sizes.attention_dropout)
    return not job.on_cuda and (attention == "latent" or (dropout and attention != "scores"))


def _takes_mask_as_it_is(job: Job) -> bool:
    """Whether no layer makes numbers of the mask's truth values (`kernels/attention.py`)."""
    own = job.architecture.family.attention == "stretches" and not job.on_cuda and job.half
    return own and attended(job)[0] <= LONGEST
