"""The console that all messages are printed on."""

from typing import Any

import rich.console


class Console(rich.console.Console):
    """Prints lines of text as they are: no brackets read as markup, no line broken in the middle of a path.

    Tables and other things of rich's own are laid out as rich does.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print lines, or things of rich's own."""
        if all(isinstance(part, str) for part in objects):
            options = {"markup": False, "highlight": False, "soft_wrap": True} | options
        super().print(*objects, **options)
