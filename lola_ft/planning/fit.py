"""The first change of a run that makes it fit, in the order of what it costs.

Gradient checkpointing costs time alone. A smaller micro batch, with more of them in a step, costs time and changes
nothing that is learned; so do experts in host memory.
Shorter rows drop or cut data; smaller ranks learn less, and an adapter that a run goes on from has its ranks. Each
change comes on top of those before.
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
    """Overrides of a recipe, and what they make of it."""

    overrides: tuple[str, ...]
    prediction: Prediction


def first_fit(job: Job, limit: int) -> Change | None:
    """The first change after which the run takes at most `limit` bytes; None if none of them is enough."""
    fixed, settings = count_fixed(job), job.settings
    for candidate in _candidates(job):
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
    if job.on_cuda and job.quantization == "nf4" and job.sizes.moe_layers and not job.offload:
        job = replace(job, offload=True)
        yield job
    for length in range((job.length - 1) // _LENGTH_STEP * _LENGTH_STEP, _SHORTEST - 1, -_LENGTH_STEP):
        job = replace(job, length=length)
        yield job
    while not job.continues and max(job.settings.ranks().values(), default=1) > 1:
        halved = {key: max(1, rank // 2) for key in _RANK_KEYS if (rank := getattr(job.settings, key))}
        job = replace(job, settings=replace(job.settings, **halved))
        yield job


def _overrides(before: Job, after: Job) -> Iterator[str]:
    """What to write behind the recipe to get from one to the other."""
    if after.checkpointing != before.checkpointing:
        yield "train.gradient_checkpointing=true"
    if after.micro_batch_size != before.micro_batch_size:
        yield f"train.micro_batch_size={after.micro_batch_size}"
        yield f"train.grad_accum_steps={after.grad_accum_steps}"
    if after.offload != before.offload:
        yield "base.offload=experts"
    if after.length != before.length:
        yield f"data.max_length={after.length}"
    for name, key in _RANK_KEYS.items():
        rank = getattr(after.settings, name)
        if rank != getattr(before.settings, name):
            yield f"{key}={rank}"
