"""Training: a recipe in, a run folder out.

What trains is imported when it is first used: previews and plans do without PEFT, TRL and bitsandbytes, which take
seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lola_ft.training.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module 'lola_ft.training' has no attribute '{name}'")
    from lola_ft.training.run import train

    return train
