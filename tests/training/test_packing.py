"""Packed rows equal those of TRL's own preparation, number for number, and none are in the process's memory."""

import errno
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lola_ft.checkpoints.base_checkpoint import open_config
from lola_ft.checkpoints.tokenizer import load_tokenizer
from lola_ft.data.encoding import dataset_of
from lola_ft.errors import UserError
from lola_ft.files import cache_root
from lola_ft.model import LolaForCausalLM
from lola_ft.training import packing
from lola_ft.training.packing import pack, ready, sequence_lengths, share_of_tokens
from lola_ft.training.trainers import build


def sequences(count: int) -> Dataset:
    """Sequences of 1 to 41 tokens, every third one with a masked prompt; a single token has nothing to learn."""
    import pyarrow

    kind = pyarrow.list_(pyarrow.int32())
    ids = [[(place * 7 + token) % 300 + 10 for token in range(1 + place * 13 % 41)] for place in range(count)]
    learned_from = [max(1, len(row) // 2) if place % 3 == 0 else 1 for place, row in enumerate(ids)]
    labels = [[-100] * start + row[start:] for start, row in zip(learned_from, ids, strict=True)]
    return dataset_of(pyarrow.table({"input_ids": pyarrow.array(ids, kind), "labels": pyarrow.array(labels, kind)}))


def is_mapped(dataset: Dataset) -> bool:
    """Return True if every number lies in a mapped file."""
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [[int(end, 16) for end in region[0].split("-")] for region in regions if ".arrow" in " ".join(region[5:])]
    buffers = [
        buffer
        for column in dataset.data.columns
        for chunk in column.chunks
        for buffer in chunk.buffers()
        if buffer is not None and buffer.size
    ]
    assert buffers, "there is something to look at"
    return all(any(start <= buffer.address < end for start, end in mapped) for buffer in buffers)


@pytest.mark.parametrize("packs", [True, False])
def test_rows_are_those_that_trl_would_make(tiny_base: Path, tmp_path: Path, packs: bool) -> None:
    shuffled = sequences(2500).select([place * 7 % 2500 for place in range(2500)])  # as a mix does; three batches
    arguments = SFTConfig(str(tmp_path), packing=packs, max_length=64, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(
        model=LolaForCausalLM.from_pretrained(tiny_base),
        args=arguments,
        train_dataset=shuffled,
        processing_class=load_tokenizer(tiny_base, open_config(tiny_base)[1].config),
    )
    rows = ready(shuffled, packs, 64)
    assert rows.to_dict() == trainer.train_dataset.to_dict()
    assert rows.features == trainer.train_dataset.features
    assert 0 < len(rows) < 2500  # packed; or without the sequences of one token


def test_packed_rows_are_mapped_from_a_file_that_is_gone() -> None:
    packed = pack(sequences(1500), 64)
    assert is_mapped(packed)
    assert not is_mapped(sequences(20)), "the test can tell"
    assert not packed.cache_files
    assert not list((cache_root() / "rows").glob(".partial-*"))


def test_packed_rows_go_to_another_process() -> None:
    packed = pack(sequences(50), 64)
    assert pickle.loads(pickle.dumps(packed)).to_dict() == packed.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("packs", [True, False])
def test_a_run_trains_and_evaluates_on_mapped_rows(
    recipe_file: Callable[..., Path],
    verb: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    packs: bool,
) -> None:
    seen: list[bool] = []
    original = build.add_guards

    def look(trainer: Any, *others: Any) -> None:
        seen.extend(is_mapped(rows) for rows in (trainer.train_dataset, *trainer.eval_dataset.values()))
        assert trainer.padding_free == packs
        original(trainer, *others)

    monkeypatch.setattr(build, "add_guards", look)
    outcome = verb("train", recipe_file(data={"packing": packs, "validation": 0.3}, train={"max_steps": 1}))
    assert outcome.code == 0, outcome.err
    assert len(seen) > 1
    assert all(seen)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "pack_dataset", full)
    with pytest.raises(UserError, match="no room for the encoded rows"):
        pack(sequences(5), 64)


def test_the_share_of_tokens_is_that_of_padded_batches() -> None:
    assert share_of_tokens(np.array([3, 1, 7]), 1, seed=0) == 1.0
    assert share_of_tokens(np.array([2, 2, 2, 2, 2]), 4, seed=0) == 1.0
    assert share_of_tokens(np.array([2, 8]), 2, seed=0) == 10 / 16
    assert share_of_tokens(np.array([2, 8]), 64, seed=0) == 10 / 16  # there are no more rows
    lengths = np.array([1, 1, 9] * 50)
    order = np.random.default_rng(5).permutation(lengths).tolist()
    batches = [order[start : start + 4] for start in range(0, 150, 4)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert len(batches[-1]) == 2
    assert share_of_tokens(lengths, 4, seed=5) == sum(order) / padded


def test_lengths_follow_the_order_of_the_rows() -> None:
    rows = sequences(2100).select([*range(2099, -1, -1)])
    assert sequence_lengths(rows).tolist() == [len(ids) for ids in rows["input_ids"]]


def test_a_run_says_how_much_of_its_batches_is_padding(
    recipe_file: Callable[..., Path], verb: Callable[..., Any]
) -> None:
    path = recipe_file(data={"packing": False}, train={"max_steps": 1, "micro_batch_size": 1, "grad_accum_steps": 1})
    assert "not packed. Micro batches of 1 are 100.0% tokens; the remainder is padding." in one_line(
        verb("train", path).out
    )
    some = one_line(verb("train", path, "train.micro_batch_size=8", f"output={path.parent / 'other'}").out)
    [share] = re.findall(r"not packed\. Micro batches of 8 are (\d\d\.\d)% tokens; the remainder is padding\.", some)
    assert 50 < float(share) < 100


def one_line(text: str) -> str:
    return " ".join(text.split())
