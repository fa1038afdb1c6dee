"""The README of a baseline's run or merged model. (The card of what is made from LOLA says much that is LOLA's.)"""

from pathlib import Path
from typing import Any

from lola_ft.baseline.families import Family
from lola_ft.files import write_text


def write_dense_card(folder: Path, manifest: dict[str, Any], family: Family, base: str, merged: bool = False) -> None:
    """Write `README.md`.

    Args:
        manifest: The run's, {} if it is not known.
        base: The base's Hub id or, in a run, whatever the recipe has; "" for a folder that means nothing to others.
    """
    named = base or f"a local {family.name} model"
    what = f"{named}, fine-tuned with LoRA and merged" if merged else f"A LoRA adapter for {named}"
    lines = [
        f"# {folder.name.strip('.').removesuffix('.partial')}",
        "",
        f"{what}: a dense baseline, made with lola_ft.",
        "",
    ]
    results = manifest.get("results", {})
    lines += [
        f"- {key.replace('_', ' ')}: {results[key]}" for key in ("steps", "mean_loss", "eval_loss") if key in results
    ]
    code = ["from transformers import AutoModelForCausalLM"]
    if merged:
        code += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")']
    else:
        code[:0] = ["from peft import PeftModel"]
        code += [
            f'model = AutoModelForCausalLM.from_pretrained("{base or "path/to/the/base"}", dtype="auto")',
            'model = PeftModel.from_pretrained(model, "adapter")',
        ]
    lines += ["", "```python", *code, "```", "", "The base's licence holds for what is made from it."]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
