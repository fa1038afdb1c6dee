"""Functions that run right after a certain module is imported, at any time and by any code.

`import lola_ft` adds LOLA to transformers' Auto classes. Importing transformers for that would cost every command
seconds, even `lola-ft --help`. So we wait until other code imports the module with the Auto classes.

This is done by a finder at the head of `sys.meta_path`, which answers only for modules with a waiting function. The
other finders find the module, and our loader executes it with the module's own loader and then calls the function. The
module keeps its own loader, so `inspect.getsource` and `importlib.resources` work as usual. `importlib.reload` calls
the function again.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader  # at run time it would import importlib.resources, a tenth of the time of `--help`

Action = Callable[[ModuleType], None]


def run_after_import(module: str, action: Action) -> None:
    """Call `action` with a module each time it is imported, and at once if it is imported already.

    A second action for the module replaces the first. If another thread imports the module at this moment, the action
    may run twice.
    """
    _FINDER.actions[module] = action
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if sys.modules.get(module) is not None:
        action(import_module(module))  # waits if another thread is importing it


class _Finder:
    """A finder of the modules that actions wait for; it asks the other finders for their specs."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, with our loader around theirs."""
        asked_by_us = getattr(self._thread, "searching", False)  # another finder may in turn ask all finders
        if fullname not in self.actions or asked_by_us:
            return None
        self._thread.searching = True
        try:
            spec = self._search_elsewhere(fullname, path, target)
        finally:
            self._thread.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.actions[fullname])  # type: ignore[assignment]
        return spec

    def _search_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader:
    """A loader that executes a module with its own loader and then calls the action; otherwise like the own loader."""

    def __init__(self, loader: "Loader", action: Action) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader creates."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own loader, execute the module, and call the action."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_FINDER = _Finder()
