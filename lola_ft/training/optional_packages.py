"""Packages that a recipe may need and that are not installed with lola_ft: missing ones are found before any work."""

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
"""The module that an optimiser of transformers is in."""
_TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


def refuse_missing_packages(train: Train) -> None:
    """Refuse what the training section asks for and this machine cannot do; names the key and the package."""
    refuse_missing_trackers(train.report_to)
    refuse_missing_optimizer(train.optimizer)
    if train.energy:
        refuse_missing_codecarbon(train.energy.country)


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed."""
    missing = [name for name in names if not any(map(find_spec, _TRACKER_PACKAGES.get(name, (name,))))]
    if missing:
        raise UserError(
            f"train.report_to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install with `pip install {' '.join(missing)}`, or leave it out; metrics.jsonl is written in any case."
        )


def refuse_missing_optimizer(name: str) -> None:
    """Refuse an optimiser whose package is not installed."""
    package = OPTIMIZER_PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise UserError(
            f"train.optimizer: {name} needs the module {package}, which is not installed. Install it, or choose "
            "another, such as adamw_8bit."
        )


def refuse_missing_codecarbon(country: str) -> None:
    """Refuse to measure energy without the package that does, or in a country that it does not know."""
    if find_spec("codecarbon") is None:
        raise UserError("train.energy: codecarbon is not installed. Install the extra `energy`, or remove the section.")
    from codecarbon.input import DataSource

    if country not in DataSource().get_global_energy_mix_data():
        raise UserError(f"train.energy.country: codecarbon knows no country '{country}'. Write it as DEU or KEN.")
