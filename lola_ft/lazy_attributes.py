"""Names of a package that are imported from its modules at their first use (PEP 562)."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, **names_by_module: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports a name from its module at first use.

    Type checkers and editors do not see names that are imported this way, so the package also imports them under
    `TYPE_CHECKING` and lists them in `__all__`.

    Args:
        package: The package's `__name__`.
        names_by_module: Per module directly below the package, the names that it offers, separated by spaces.
    """
    homes = {name: f"{package}.{module}" for module, names in names_by_module.items() for name in names.split()}

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(homes[name]), name)

    return get_attribute
