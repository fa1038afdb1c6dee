"""The search for the first change that makes a run fit into memory, cheapest changes first.

The candidates build on one another. For example, a run with micro batch 4, 4 accumulation steps, rows of 1024 tokens
and rank 16 is tried with:

1. gradient checkpointing (costs only time)
2. micro batch 2 x 8 steps, then 1 x 16 (costs time; the batch of 16 rows stays the same)
3. rows of 960, 896, ... 128 tokens (drops or cuts data)
4. ranks 8, 4, 2, 1 (learns less; not if the run continues an adapter, whose ranks are fixed)

The first candidate whose predicted peak is within the limit is the advice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lola_ft.planning.job import Job
from lola_ft.planning.predict import Prediction, count_fixed, predict

_LENGTH_STEP = 64
_SHORTEST = 128
_RANK_KEYS = {
    "attention_rank": "adapter.attention.rank",
    "mlp_rank": "adapter.mlp.rank",
    "shared_rank": "adapter.shared_experts.rank",
    "expert_rank": "adapter.experts.rank",
    "router_rank": "router.rank",
}


@dataclass(frozen=True)
class Change:
    """Overrides of a recipe, and the prediction with these overrides."""

    overrides: tuple[str, ...]
    prediction: Prediction


def first_fit(job: Job, limit: int) -> Change | None:
    """Return the first change after which the run needs at most `limit` bytes; None if no change is enough."""
    candidates = list(_candidates(job))
    if not candidates or predict(candidates[-1]).total > limit:  # the smallest of all
        return None
    fixed, settings = count_fixed(job), job.settings
    for candidate in candidates:
        if candidate.settings is not settings:
            fixed, settings = count_fixed(candidate), candidate.settings
        prediction = predict(candidate, fixed)
        if prediction.total <= limit:
            return Change(tuple(_overrides(job, candidate)), prediction)
    return None


def _candidates(job: Job) -> Iterator[Job]:
    if not job.checkpointing:
        job = replace(job, checkpointing=True)
        yield job
    together = job.micro_batch_size * job.grad_accum_steps
    for size in range(job.micro_batch_size - 1, job.least_micro_batch - 1, -1):
        if together % size == 0:
            job = replace(job, micro_batch_size=size, grad_accum_steps=together // size)
            yield job
    for length in range((job.length - 1) // _LENGTH_STEP * _LENGTH_STEP, _SHORTEST - 1, -_LENGTH_STEP):
        job = replace(job, length=length)
        yield job
    while not job.continues and max(job.settings.ranks().values(), default=1) > 1:
        halved = {key: max(1, rank // 2) for key in _RANK_KEYS if (rank := getattr(job.settings, key))}
        job = replace(job, settings=replace(job.settings, **halved))
        yield job


def _overrides(before: Job, after: Job) -> Iterator[str]:
    """Yield the overrides that turn the recipe of one job into that of the other."""
    if after.checkpointing != before.checkpointing:
        yield "train.gradient_checkpointing=true"
    if after.micro_batch_size != before.micro_batch_size:
        yield f"train.micro_batch_size={after.micro_batch_size}"
        yield f"train.grad_accum_steps={after.grad_accum_steps}"
    if after.length != before.length:
        yield f"data.max_length={after.length}"
    for name, key in _RANK_KEYS.items():
        rank = getattr(after.settings, name)
        if rank != getattr(before.settings, name):
            yield f"{key}={rank}"
