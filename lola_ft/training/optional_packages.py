"""Checks for packages that a recipe may need but that are not installed with lola_ft, before any work is done."""

from collections.abc import Sequence
from importlib.util import find_spec

from lola_ft.errors import UserError
from lola_ft.recipe.schema import Train

OPTIMIZER_PACKAGES = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "grokadamw": "grokadamw",
    "schedule_free_radam": "schedulefree",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "stable_adamw": "optimi",
}
"""The module that each of transformers' optimisers needs."""
_TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


def refuse_missing_packages(train: Train) -> None:
    """Raise UserError if the training section needs a package that is missing; names the key and the package."""
    refuse_missing_trackers(train.report_to)
    refuse_missing_optimizer(train.optimizer)
    if train.energy:
        refuse_missing_codecarbon(train.energy.country)


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise UserError for trackers whose packages are not installed."""
    missing = [name for name in names if not any(map(find_spec, _TRACKER_PACKAGES.get(name, (name,))))]
    if missing:
        raise UserError(
            f"train.report_to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install with `pip install {' '.join(missing)}`, or remove the key; metrics.jsonl is written in any case."
        )


def refuse_missing_optimizer(name: str) -> None:
    """Raise UserError for an optimiser whose package is not installed."""
    package = OPTIMIZER_PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise UserError(
            f"train.optimizer: {name} needs the module {package}, which is not installed. Install it, or choose "
            "another, such as adamw_8bit."
        )


def refuse_missing_codecarbon(country: str) -> None:
    """Raise UserError if codecarbon is not installed or does not know the country."""
    if find_spec("codecarbon") is None:
        raise UserError("train.energy: codecarbon is not installed. Install the extra `energy`, or remove the section.")
    from codecarbon.input import DataSource

    if country not in DataSource().get_global_energy_mix_data():
        raise UserError(f"train.energy.country: codecarbon knows no country '{country}'. Write it as DEU or KEN.")
