"""Optimisers that transformers takes from packages which are not installed with lola_ft."""

from importlib.util import find_spec

from lola_ft.errors import UserError

PACKAGES = {
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
"""The module that each of them is in."""


def refuse_missing_optimizer(name: str) -> None:
    """Refuse an optimiser that cannot be made here, before any work is done.

    Raises:
        UserError: Its package is missing.
    """
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise UserError(
            f"train.optimizer: {name} needs the module {package}, which is not installed. Install it, or choose "
            "another, such as adamw_8bit."
        )
