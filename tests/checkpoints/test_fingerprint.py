"""A base's fingerprint is the same for copies in another form, and different for other weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.fingerprint import fingerprint
from lola_ft.model import LolaForCausalLM


def identity(path: Path) -> str:
    return fingerprint(BaseCheckpoint.open(path))


def test_shards_precision_and_legacy_tensors_do_not_matter(folder: Any) -> None:
    before = identity(folder.path)
    assert len(before) == 16
    assert int(before, 16) >= 0
    folder.set_tensors(folder.tensors | {"lm_head.weight": torch.ones(320, 64)})
    assert identity(folder.path) == before
    folder.cast(torch.bfloat16)
    assert identity(folder.path) == before
    folder.shard(3)
    assert identity(folder.path) == before


@pytest.mark.parametrize("name", ["transformer.h.0.ln_1.bias", "transformer.h.3.moe.experts.3.c_proj.weight"])
def test_another_weight_is_another_base(name: str, folder: Any) -> None:
    before = identity(folder.path)
    folder.set_tensors(folder.tensors | {name: folder.tensors[name] * 1.1 + 0.1})
    assert identity(folder.path) != before


def test_two_random_models_differ(make_model: Callable[..., LolaForCausalLM], tmp_path: Path) -> None:
    for seed in (1, 2):
        make_model(seed=seed).save_pretrained(tmp_path / str(seed))
    assert identity(tmp_path / "1") != identity(tmp_path / "2")
