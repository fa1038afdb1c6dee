"""The memory of attention between its linear layers, by the kind of attention in the family's table.

`fused`       PyTorch's `scaled_dot_product_attention`. It keeps no scores, except on a CPU with dropout, where it is
              computed step by step in float32.
`scores`      Computes and keeps every score, with a mask of numbers.
`latent`      Queries and keys are wider than values. Fused on a GPU, step by step in float32 on a CPU.

Packed documents attend one stretch at a time (`model/packed.py`). On a CPU in bfloat16, fused attention without dropout
is that of `kernels/attention.py`.

An example: kind `scores`, 4 rows of 512 tokens, 16 heads. `attended` gives groups of 512 tokens, 4 of them; a layer has
4 * 16 * 512 * 512 = 16.8 M scores (H, S, S), kept as 67 MB in float32, and all layers share a mask of 4 * 512 * 512.

Letters: T tokens, H heads, S length of a sequence.
"""

from lola_ft.kernels.attention import LONGEST
from lola_ft.model.packed import TOKENS, exceeds_window
from lola_ft.planning.job import Job

_FLOAT = 4


def attended(job: Job) -> tuple[int, float]:
    """Return the number of tokens that attend to one another, and how many such groups a micro batch has.

    A group is a row or, with packing, a stretch of whole documents. Where a stretch may be longer than the model's
    sliding window, all packed rows are one group (`families/attention.py`).
    """
    if not job.packing:
        return job.length, job.sequences
    length = min(job.tokens, TOKENS.get(job.device, job.tokens))
    if exceeds_window(job.architecture.config, _longest(job, length)):
        length = job.tokens
    return length, job.tokens / length


def _longest(job: Job, length: int) -> int:
    """Return the tokens of the longest stretch: a single document may be longer than stretches of several."""
    return min(job.tokens, max(length, job.length))


def _has_stretches(job: Job) -> bool:
    return job.packing and attended(job)[1] > 1


def score_numbers(job: Job) -> int:
    """Return the largest number of scores of a layer (H, S, S), over the whole micro batch."""
    length, count = attended(job)
    return round(count * job.sizes.heads * length * _longest(job, length))


def mask_numbers(job: Job) -> int:
    """Return the number of values in the mask that all layers share; fused attention on one unpacked row has none."""
    length, count = attended(job)
    needed = job.packing or count > 1 or job.architecture.family.attention == "scores"
    return round(count * length**2) if needed else 0


def mask_bytes(job: Job) -> int:
    """Return the bytes of the mask: numbers for kind `scores`, else bools."""
    return mask_numbers(job) * (job.width if job.architecture.family.attention == "scores" else 1)


def kept_inside(job: Job, size: int) -> tuple[int, bool]:
    """Return the bytes that attention keeps for backward, and True if they include the output projection's input.

    Args:
        size: Values per token of the queries of all heads.
    """
    sizes, row = job.sizes, job.tokens * size
    if job.architecture.family.attention == "scores":
        scores = score_numbers(job)
        kept = 3 * row * job.width + scores * _FLOAT  # queries, keys, values (T, size); softmax (H, S, S) in float32
        if sizes.attention_dropout:  # its mask (H, S, S)
            kept += scores * (1 if job.on_cuda else job.width)
        if sizes.attention_dropout or job.half:  # the probabilities after dropout or cast are another tensor
            kept += scores * job.width
        return kept, False
    if is_stepwise(job):
        rows = (
            5 if (job.packing or job.sequences == 1) and not job.half else 3
        )  # the values of a single row are not copied
        return (rows * row + 3 * score_numbers(job)) * _FLOAT, False
    # Fused: queries, keys, values and the output (T, size), and the logarithm of each softmax's sum (T, H).
    kept = 4 * row * job.width + job.tokens * sizes.heads * _FLOAT
    if not _takes_mask_as_it_is(job):
        kept += mask_numbers(job) * job.width
    return kept, not _has_stretches(job)  # the outputs of several stretches are copied beside one another


def kept_inside_latent(job: Job, query: int, value: int, wide: int) -> tuple[int, bool]:
    """Return the result of `kept_inside` for latent attention.

    Args:
        query, value: Values per token of the queries and of the values of all heads.
        wide: Outputs of the layer that gives keys and values; values are a view of its output unless they are cast.
    """
    tokens, sizes = job.tokens, job.sizes
    if job.on_cuda:
        kept = tokens * (2 * query + wide + value) * job.width + tokens * sizes.heads * _FLOAT
        return kept + mask_numbers(job) * job.width, not _has_stretches(job)
    scores = score_numbers(job) * (3 if sizes.attention_dropout else 1)
    return (tokens * (2 * query + (value if job.half else wide)) + scores) * _FLOAT, False


def is_stepwise(job: Job) -> bool:
    """Tell whether attention that is not of kind `scores` keeps its scores: on a CPU with dropout, or latent."""
    attention = job.architecture.family.attention
    dropout = bool(job.sizes.attention_dropout)
    return not job.on_cuda and (attention == "latent" or (dropout and attention != "scores"))


def _takes_mask_as_it_is(job: Job) -> bool:
    """Tell whether attention uses the mask's bools directly, without converting them (`kernels/attention.py`)."""
    return not job.on_cuda and job.half and attended(job)[0] <= LONGEST
