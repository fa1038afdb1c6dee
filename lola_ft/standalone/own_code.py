"""lola_ft's code in a folder with weights: copied into the folder, and named by its config."""

from pathlib import Path
from typing import Any

from lola_ft.families import Family
from lola_ft.files import copy_files
from lola_ft.standalone.portable_tokenizer import make_tokenizer_portable

_HERE = Path(__file__).parent


def config_for(family: Family, config: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return a checkpoint's `config.json` for another folder than the checkpoint's own.

    Args:
        origin: The checkpoint's Hub id, "" for a folder. Remote code that the config names without an id is there.
    """
    changed = dict(config)
    if "dtype" in config:  # transformers 5 writes it; earlier versions read the other name
        changed.setdefault("torch_dtype", config["dtype"])
    if family.hub_class:
        changed["architectures"] = [family.hub_class]
    named = {
        name: code if "--" in code or not origin else f"{origin}--{code}"
        for name, code in config.get("auto_map", {}).items()
        if code.partition(".")[0] not in _modules(family)  # entries of an earlier export
    }
    if auto_map := named | dict(family.auto_map):
        changed["auto_map"] = auto_map
    return changed


def complete_folder(family: Family, folder: Path) -> list[str]:
    """Copy lola_ft's code for the family, if there is any, into a folder with weights, and make its tokenizer portable.

    Returns:
        Names of other Python files in the folder, which are kept.
    """
    if not family.auto_map:
        return []
    copy_files(_HERE, folder, tuple(f"{module}.py" for module in _modules(family)))
    make_tokenizer_portable(folder)
    return sorted(file.name for file in folder.glob("*.py") if file.stem not in _modules(family))


def _modules(family: Family) -> list[str]:
    """Return the names of lola_ft's modules that a family's config names."""
    return sorted({code.partition(".")[0] for code in family.auto_map.values()})
