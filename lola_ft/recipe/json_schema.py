"""The recipe's JSON schema, with which editors complete keys and underline mistakes."""

import json

from lola_ft.recipe.schema import Recipe

SCHEMA_FILE = "schema.json"


def schema_text() -> str:
    """The schema as a file holds it; `recipes/schema.json` is this text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
