"""What a run recorded about itself, for a merge of its adapter."""

import json
from pathlib import Path
from typing import Any

from lola_ft.file_names import MANIFEST_FILE


def run_record(adapter: Path) -> dict[str, Any] | None:
    """The manifest of the run whose adapter this is (`RUN/adapter`), if it lies in one."""
    try:
        record = json.loads((adapter.parent / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def trained_in_4_bit(adapter: Path) -> bool:
    """Whether training saw a 4-bit base; taken to be so where no run says otherwise."""
    recipe = (run_record(adapter) or {}).get("recipe", {})
    return recipe.get("base", {}).get("quantization", "nf4") == "nf4"
