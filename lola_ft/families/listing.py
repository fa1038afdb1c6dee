"""The text and JSON of `lola-ft families`: the features that are supported for each base family."""

import json
from typing import Any

from lola_ft.families import FAMILIES, Family

_POSITIONS = {"learned": "learned, as many as its config says", "rotary": "rotary", "slopes": "slopes (ALiBi)"}


def families_as_text() -> str:
    """Describe every family in a few lines."""
    blocks = []
    for family in FAMILIES.values():
        facts = facts_of(family)
        lines = [
            f"{family.title} (model_type {family.model_type})",
            f"  LoRA on        {', '.join(facts['lora'])}",
            f"  fully trained  {', '.join(facts['trained_fully'])}, if a recipe asks for it",
            f"  positions      {_POSITIONS[family.positions]}",
            f"  packing        {'yes' if family.packs else 'no: its attention would mix the documents of a row'}",
            f"  heads          {', '.join(facts['heads'])}",
            f"  layouts        {', '.join(facts['layouts'])}",
            *([f"  licence        {family.licence}"] if family.licence else []),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def families_as_json() -> str:
    """Return the same facts as a JSON object by model type."""
    return json.dumps({name: facts_of(family) for name, family in FAMILIES.items()}, indent=2)


def facts_of(family: Family) -> dict[str, Any]:
    """Return the facts about a family that a user needs to choose a base."""
    trained = ["router"] if "router" in family.lora_groups else []
    return {
        "title": family.title,
        "lora": list(family.lora_groups),
        "trained_fully": trained + list(family.fully),
        "positions": family.positions,
        "packing": family.packs,
        "heads": list(family.heads),
        "layouts": ["peft", "per_expert"] if family.experts else ["peft"],
        "licence": family.licence,
    }
