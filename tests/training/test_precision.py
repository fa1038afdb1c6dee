"""A run computes in the number format that its machine is fast in."""

import pytest
import torch

from lola_ft.errors import UserError
from lola_ft.training import precision
from lola_ft.training.precision import choose_precision

CPU = torch.device("cpu")


def test_bfloat16_is_used_where_the_machine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)
    chosen = choose_precision("bfloat16", CPU)
    assert (chosen.dtype, chosen.bf16, chosen.note) == (torch.bfloat16, True, "")


def test_float32_is_used_and_said_where_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: False)
    chosen = choose_precision("bfloat16", CPU)
    assert (chosen.dtype, chosen.bf16) == (torch.float32, False)
    assert "float32" in chosen.note


def test_float16_wants_a_gpu() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        choose_precision("float16", CPU)
