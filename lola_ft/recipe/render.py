"""A recipe back as YAML, with every setting filled in."""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from lola_ft.recipe.schema import Recipe

_HEADER = "# Every setting of the run, defaults included; python finetune.py runs it again.\n"


def render_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text that `load_recipe` reads back as an equal Recipe."""
    settings = _as_written(recipe.model_dump())
    if recipe.train.max_steps is not None:
        del settings["train"]["epochs"]  # the two exclude each other
    yaml = YAML()
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(settings, stream)
    return _HEADER + stream.getvalue()


def _as_written(value: Any) -> Any:
    """Settings as a recipe writes them: one that is off is left out, odd characters are escaped in quotes."""
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)
    return value
