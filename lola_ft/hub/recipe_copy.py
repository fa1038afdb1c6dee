"""A run's recipe for others: the same settings, without this machine's folders."""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lola_ft.checkpoints.folder import TEMPLATE_FILE

_HEADER = "# The recipe of this model. Local files go by their names alone.\n"


def portable_recipe(text: str, base_id: str, base_revision: str | None) -> str:
    """The recipe with the base's Hub id, and without folders and the `hub` section.

    Args:
        text: A run's `recipe.yaml`, every setting filled in.
    """
    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    recipe = yaml.load(text)
    recipe["base"]["model"] = base_id
    if base_revision:
        recipe["base"]["revision"] = base_revision
    data = recipe["data"]
    validation = data.get("validation")
    for source in [*data["sources"], *(validation if isinstance(validation, list) else [])]:
        if "path" in source:
            source["path"] = _name(source["path"])
    if data.get("template", "").endswith(".jinja"):
        data["template"] = TEMPLATE_FILE
    experts: dict[str, Any] = recipe.get("adapter", {}).get("experts") or {}
    if isinstance(experts.get("select"), str):
        experts["select"] = _name(experts["select"])
    recipe["output"] = _name(recipe["output"])
    recipe.pop("hub", None)
    stream = io.StringIO()
    yaml.dump(recipe, stream)
    return _HEADER + re.sub(r"\A(#.*\n)+", "", stream.getvalue())


def _name(path: str) -> str:
    return Path(path).name or "run"
