"""Changes that make a run fit come in order of their cost; sizes are read as people write them."""

from dataclasses import replace

import pytest

from lola_ft.adapters import AdapterSettings
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.model.config import LolaConfig
from lola_ft.planning import Job, first_fit, parse_size, predict, show_size

LOLA = Job(
    architecture_of(LolaConfig()),
    AdapterSettings(attention_rank=16, mlp_rank=16, expert_rank=8, dropout=0.05),
    micro_batch_size=8,
    grad_accum_steps=3,
    length=2048,
    packing=False,
    checkpointing=False,
)


@pytest.mark.slow
def test_changes_come_in_the_order_of_what_they_cost() -> None:
    checkpointed = replace(LOLA, checkpointing=True)
    single = replace(checkpointed, micro_batch_size=1, grad_accum_steps=24)
    kept = replace(single, offload=True)
    short = replace(kept, length=128)
    halved = replace(short, settings=replace(LOLA.settings, attention_rank=8, mlp_rank=8, expert_rank=4))
    rank_one = replace(short, settings=replace(LOLA.settings, attention_rank=1, mlp_rank=1, expert_rank=1))
    checkpointing = "train.gradient_checkpointing=true"
    batch = ("train.micro_batch_size=1", "train.grad_accum_steps=24")
    ranks = ("adapter.attention.rank=8", "adapter.mlp.rank=8", "adapter.experts.rank=4")
    for wanted, overrides in (
        (checkpointed, (checkpointing,)),
        (single, (checkpointing, *batch)),
        (kept, (checkpointing, *batch, "base.offload=experts")),
        (short, (checkpointing, *batch, "base.offload=experts", "data.max_length=128")),
        (halved, (checkpointing, *batch, "base.offload=experts", "data.max_length=128", *ranks)),
    ):
        change = first_fit(LOLA, predict(wanted).total)
        assert change is not None
        assert change.overrides == overrides
        assert change.prediction == predict(wanted)
    assert first_fit(LOLA, predict(rank_one).total - 1) is None


def test_a_step_keeps_its_rows_and_every_smaller_micro_batch_is_tried() -> None:
    job = replace(LOLA, micro_batch_size=6, grad_accum_steps=4, checkpointing=True)
    sizes = []
    for wanted in (4, 3, 2, 1):
        change = first_fit(job, predict(replace(job, micro_batch_size=wanted)).total)
        assert change is not None
        changed = change.prediction.job
        assert changed.micro_batch_size * changed.grad_accum_steps == 24
        sizes.append(changed.micro_batch_size)
    assert sizes == [4, 3, 2, 1], "5 does not divide 24"


def test_what_is_on_already_is_not_suggested() -> None:
    job = replace(LOLA, checkpointing=True, micro_batch_size=1, offload=True)
    change = first_fit(job, predict(replace(job, length=1024)).total)
    assert change is not None
    assert change.overrides == ("data.max_length=1024",)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("24GiB", 24 * 2**30), (" 900 mb ", 9 * 10**8), ("1.5gb", 1_500_000_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8 elephants", "GB", "", "-8GB", "0GB", "8G B", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def test_sizes_are_shown_in_fitting_units() -> None:
    assert [show_size(size) for size in (12, 5_600_000, 12_340_000_000)] == ["12 bytes", "5.6 MB", "12.34 GB"]
