"""Training: a recipe in, a run folder out.

What trains is imported when it is first used: previews and plans do without PEFT, TRL and bitsandbytes, which take
seconds.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes

if TYPE_CHECKING:
    from lola_ft.training.run import train

__all__ = ["train"]


__getattr__ = lazy_attributes(__name__, run="train")
