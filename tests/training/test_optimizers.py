"""Every optimiser that a recipe may name can be made, or is refused before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from lola_ft.errors import UserError
from lola_ft.recipe import unsupported
from lola_ft.recipe.allowed_values import OPTIMIZERS
from lola_ft.training.optional_packages import OPTIMIZER_PACKAGES, refuse_missing_optimizer
from lola_ft.training.trainers.arguments import _OPTIMIZERS
from tests.conftest import Outcome

OFFERED = [name for name in OPTIMIZERS if not list(unsupported.find({"train": {"optimizer": name}}))]


@pytest.mark.parametrize("name", OFFERED)
def test_an_optimiser_is_there_or_refused(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), optim=_OPTIMIZERS.get(name, name), use_cpu=True)
    try:
        made: object = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError):
        made = None
    if made:
        refuse_missing_optimizer(name)
        return
    with pytest.raises(UserError, match=f"train.optimizer: {name} needs the module {OPTIMIZER_PACKAGES.get(name)}"):
        refuse_missing_optimizer(name)


def test_a_missing_package_is_said_before_anything_is_written(
    recipe_file: Callable[..., Path], verb: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZER_PACKAGES, "adafactor", "no_such_module")
    for dry_run in ([], ["--dry-run"]):
        outcome = verb("train", recipe_file(train={"optimizer": "adafactor"}), *dry_run)
        assert outcome.code == 2
        assert "train.optimizer: adafactor needs the module no_such_module, which is not installed" in outcome.err
    assert not (tmp_path / "run").exists()
