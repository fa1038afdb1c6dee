"""The effects of rounding: measured on the three models, or reported as left out."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lola_ft.merging import merge
from lola_ft.merging.effects import Effects, advice, effects_table, measure_effects
from lola_ft.merging.merge_run import merge_command
from lola_ft.merging.outputs import Outputs


def outputs(logits: list[list[float]], ids: list[int]) -> list[Outputs]:
    return [Outputs(torch.tensor(ids), torch.tensor(logits), torch.zeros(1, 1), "float32")]


def test_effects_equal_the_values_computed_by_hand() -> None:
    """Two tokens of a vocabulary of three, where the first predicts the second."""
    ids = [0, 1]
    one = outputs([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]], ids)
    two = outputs([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0]], ids)
    effects = measure_effects(one, two, one)
    p = torch.tensor([1.0, 0.0, 0.0]).softmax(-1)
    assert effects.merged == pytest.approx(float(torch.tensor(3.0).log()))
    assert effects.adapter_on_4_bit == pytest.approx(-float(p[1].log()))
    assert effects.merged_from_4_bit is not None
    assert effects.merged_from_4_bit.kl == pytest.approx(float((p * (3 * p).log()).sum()) / 2)
    assert effects.merged_from_4_bit.loss_difference == pytest.approx(effects.merged - effects.adapter_on_4_bit)
    assert effects.merged_from_original is not None
    assert effects.merged_from_original.kl == 0
    assert effects.merged_from_original.top1_agreement == 1
    assert measure_effects(one, None, one).original_from_4_bit is None


@pytest.mark.parametrize("rounding", ["base", "nf4"])
def test_each_rounding_keeps_the_predictions_of_its_base(
    rounding: str, copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    effects = merge(copy_base("base"), adapter, tmp_path / "merged", rounding=rounding).effects
    assert effects is not None
    near, far = effects.merged_from_original, effects.merged_from_4_bit
    if rounding == "nf4":
        near, far = far, near
    assert near is not None
    assert far is not None
    assert near.kl < 1e-6 < far.kl
    assert near.top1_agreement == 1.0
    assert effects.original_from_4_bit is not None
    assert effects.original_from_4_bit.kl > 1e-6


def test_the_command_prints_effects_and_proof(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_command(str(adapter), str(tiny_base), str(tmp_path / "merged"), "auto", None, False, "full")
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("(1) adapter, 4-bit base", "(2) adapter, original", "merged, rounding base", "Choose nf4 to keep"):
        assert text in printed
    assert "58 of 58 adapter tensors are applied exactly once" in printed


def test_without_a_4_bit_base_there_is_no_choice() -> None:
    effects = Effects(merged=1.0, adapter_on_original=1.0)
    assert advice(effects) == ""
    console = Console(record=True, width=100)
    console.print(effects_table(effects, "base"))
    assert "4-bit" not in console.export_text()


def test_models_that_do_not_fit_in_memory_are_skipped_with_the_reason(
    tiny_base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs_module = import_module("lola_ft.merging.outputs")

    class Memory:
        available = 1_000_000

    monkeypatch.setattr(outputs_module.psutil, "virtual_memory", Memory)
    merge_command(str(adapter), str(tiny_base), str(tmp_path / "merged"), "auto", None, False, "full")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Logits were not compared: the model needs about 0.5 GB of memory to run and 0.0 GB are free" in printed
    assert "exactly once" in printed
    report = (tmp_path / "merged" / "merge_report.json").read_text()
    assert '"verification": null' in report


@pytest.mark.parametrize(
    ("check", "proof", "logits"),
    [(True, True, True), ("weights", True, False), ("none", False, False), (False, False, False)],
)
def test_each_check_option_runs_its_checks(
    check: bool | str, proof: bool, logits: bool, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = merge(tiny_base, adapter, tmp_path / "merged", check=check)
    assert (report.weights is not None, report.verification is not None) == (proof, logits)
    assert (report.effects is not None) == logits
