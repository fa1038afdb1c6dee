"""The code beside the weights: copied into a folder, and named by its config."""

from pathlib import Path
from typing import Any

from lola_ft.families import Family
from lola_ft.files import copy_files
from lola_ft.standalone.portable_tokenizer import make_tokenizer_portable

_HERE = Path(__file__).parent


def config_for(family: Family, config: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return a checkpoint's `config.json`, fit to lie in another folder than its own.

    Args:
        origin: The checkpoint's Hub id, "" for a folder; remote code that it names without an id is looked for there.
    """
    changed = dict(config)
    if "dtype" in config:  # of transformers 5; earlier versions read the other name
        changed.setdefault("torch_dtype", config["dtype"])
    if family.hub_class:
        changed["architectures"] = [family.hub_class]
    named = {
        name: code if "--" in code or not origin else f"{origin}--{code}"
        for name, code in config.get("auto_map", {}).items()
        if code.partition(".")[0] not in _modules(family)  # of an earlier export
    }
    if auto_map := named | dict(family.auto_map):
        changed["auto_map"] = auto_map
    return changed


def complete_folder(family: Family, folder: Path) -> list[str]:
    """Put the family's code of ours, if it has any, into a folder with weights; make its tokenizer portable.

    Returns:
        Names of other Python files in the folder, which stay.
    """
    if not family.auto_map:
        return []
    copy_files(_HERE, folder, tuple(f"{module}.py" for module in _modules(family)))
    make_tokenizer_portable(folder)
    return sorted(file.name for file in folder.glob("*.py") if file.stem not in _modules(family))


def _modules(family: Family) -> list[str]:
    """Names of the modules of ours that a family's config names."""
    return sorted({code.partition(".")[0] for code in family.auto_map.values()})
