"""The card's text in Markdown, with the YAML header that the Hub reads."""

import re
from typing import Any

from huggingface_hub import ModelCardData

from lola_ft.card.facts import CardFacts
from lola_ft.card.snippet import carries_code, snippets
from lola_ft.card.stages import STAGE_HEADER, stage_rows, stages_in
from lola_ft.card.tables import LONGEST_OPEN, folded, table, table_of_languages
from lola_ft.file_names import RECIPE_FILE
from lola_ft.repo_id import is_repo_id

_SECTIONS = ("routing", "energy")
_NAMED_RESULTS = {
    "steps": "optimiser steps",
    "tokens": "tokens",
    "mean_loss": "training loss",
    "eval_loss": "validation loss",
}


def render_card(facts: CardFacts) -> str:
    """Return the README's text; parts without known facts are left out."""
    parts = [
        f"---\n{_metadata(facts).to_yaml()}\n---",
        f"# {facts.title}",
        _introduction(facts),
        table(["", ""], _summary(facts)),
        _stages(facts),
        _data(facts),
        _results(facts),
        *(_figures(facts, name) for name in _SECTIONS),
        _loading(facts),
        _licence(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: CardFacts) -> ModelCardData:
    adapter = facts.kind == "adapter"
    codes = sorted({code.lower().replace("_", "-").partition("-")[0] for code in facts.languages} - {"und"})
    has_base = facts.published or is_repo_id(facts.base)
    return ModelCardData(
        base_model=facts.base if has_base else None,
        base_model_relation=("adapter" if adapter else "finetune") if has_base else None,
        library_name="peft" if adapter else "transformers",
        license=facts.terms.licence or (facts.family.licence if facts.family else None),
        license_name=facts.terms.name,
        license_link=_licence_link(facts),
        language=[code for code in codes if re.fullmatch(r"[a-z]{2,3}", code)] or None,
        datasets=facts.datasets or None,
        pipeline_tag="text-generation",
        tags=[*sorted(["lola_ft", *(facts.family.tags if facts.family else ())]), *(["lora"] if adapter else [])],
        **facts.terms.gate,  # has no effect until the new repository has a gate too
    )


def _introduction(facts: CardFacts) -> str:
    base = _base(facts)
    if facts.kind == "merged":
        return f"{base}, fine-tuned with LoRA and merged into ordinary weights with lola_ft."
    recipe = f"; its settings are in `{RECIPE_FILE}`" if facts.recipe else ""
    return f"A LoRA adapter for {base}, trained with lola_ft{recipe}."


def _base(facts: CardFacts) -> str:
    return f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.published else facts.base


def _summary(facts: CardFacts) -> list[list[str]]:
    base, recipe, report = facts.manifest.get("base", {}), facts.recipe, facts.merge_report
    revision = f", revision `{facts.base_revision}`" if facts.base_revision else ""
    identity = f" (fingerprint `{facts.fingerprint}`)" if facts.fingerprint else ""
    rows = [["base", f"{facts.base}{revision}{identity}"]]
    if facts.layout:
        rows.append(["layout", f"`{facts.layout}`"])
    if recipe:
        stored = "4-bit (NF4) base" if facts.quantization == "nf4" else "unquantised base"
        dtype = base.get("dtype") or recipe.get("base", {}).get("dtype")
        rows.append(["trained on", f"{stored}, {dtype}" if dtype else stored])
        if "adapter" in recipe:
            rows.append(["LoRA", lora_line(recipe)])
            beside = [name for name in ("norms", "biases") if recipe["adapter"].get(name)]
            rows += [["fully trained", " and ".join(beside)]] if beside else []
        if "router" in recipe:
            rows.append(["router", recipe["router"]["mode"]])
        if "train" in recipe:
            rows.append(["learning rate", f"{recipe['train']['learning_rate']:g}, {recipe['train']['scheduler']}"])
    if trained := facts.manifest.get("trained"):
        rows.append(["trained parameters", f"{sum(group['parameters'] for group in trained.values()):,}"])
    return rows + (merge_rows(report) if report else [])


def lora_line(recipe: dict[str, Any]) -> str:
    """Return ranks by group and alpha of a resolved recipe."""
    groups = [(name, recipe["adapter"].get(name)) for name in ("attention", "mlp", "shared_experts", "experts")]
    ranks = ", ".join(f"{name} rank {group['rank']}" for name, group in groups if group) or "none"
    return f"{ranks}, alpha {recipe['adapter']['alpha']:g}"


def _stages(facts: CardFacts) -> str:
    """Return the table of the runs behind the adapter; "" if it was trained from the base in one run."""
    stages = stages_in(facts.manifest) or facts.merge_report.get("stages", [])
    if not any(stage.get("started_from") for stage in stages):
        return ""
    return f"## Stages\n\n{table(STAGE_HEADER, stage_rows(stages))}"


def _data(facts: CardFacts) -> str:
    if not facts.languages:
        return ""
    rows = [[code, f"{c['kept']:,}", f"{c['trained_tokens']:,}"] for code, c in facts.languages.items()]
    links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
    local = sum(1 for source in facts.sources if source.get("path"))
    own = [f"{local} local file{'s' if local > 1 else ''}"] if local else []
    said = f"From {' and '.join([*([links] if links else []), *own])}.\n\n" if links or own else ""
    sizes = [counts["trained_tokens"] for counts in facts.languages.values()]
    shown = table_of_languages(["language", "rows", "trained tokens"], rows, sizes, "trained tokens")
    return f"## Data\n\n{said}{shown}"


def _results(facts: CardFacts) -> str:
    results = facts.manifest.get("results") or {}
    rows = [[label, _number(results[key])] for key, label in _NAMED_RESULTS.items() if key in results]
    whole = f"## Results\n\n{table(['', ''], rows)}" if rows else ""
    by_language = {k: v for k, v in results.items() if isinstance(v, dict) and k not in _SECTIONS}
    if not by_language:
        return whole
    codes = sorted({code for values in by_language.values() for code in values})
    lines = [[code, *(_number(values.get(code, "")) for values in by_language.values())] for code in codes]
    first, values = next(iter(by_language.items()))
    shown = table_of_languages(["language", *by_language], lines, [values.get(code) for code in codes], first)
    return f"{whole}\n\n{shown}".strip()


def _figures(facts: CardFacts, name: str) -> str:
    """Return a section with the figures that a run kept under a name; nested names become `outer / inner`."""
    figures = facts.manifest.get(name) or facts.manifest.get("results", {}).get(name)
    rows = [[key, _number(value)] for key, value in _flat(figures)] if isinstance(figures, dict) else []
    if not rows:
        return ""
    shown = table(["", ""], rows)
    return f"## {name.capitalize()}\n\n{shown if len(rows) <= LONGEST_OPEN else folded(f'{len(rows)} figures', shown)}"


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in figures.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key} / ")
        elif isinstance(value, int | float | str):
            pairs.append((f"{prefix}{key}".replace("_", " "), value))
    return pairs


def _loading(facts: CardFacts) -> str:
    blocks = [f"{heading}:\n\n```python\n{code}```" for heading, code in snippets(facts)]
    blocks += _limits(facts)
    if "prompt_template.jinja" in facts.files:
        blocks.append("It was trained on prompts in the form of `prompt_template.jinja`; use the same form to ask it.")
    if "chat_template.jinja" in facts.files:
        blocks.append("The tokenizer's chat template writes conversations in the form used in training.")
    return "## How to load it\n\n" + "\n\n".join(blocks)


def _limits(facts: CardFacts) -> list[str]:
    """Return notes on further ways to load the model, and on ways that do not work."""
    family = facts.family
    if family is None:
        return []
    if facts.kind == "merged":
        if carries_code(facts):
            return ["The model needs only the code beside its weights, which `trust_remote_code=True` loads."]
        return [] if family.native else ["Only transformers is needed: it contains this model's class."]
    trains_experts = facts.recipe.get("adapter", {}).get("experts") or not facts.recipe
    if family.auto_map and facts.layout == "peft" and trains_experts:
        return [
            f"This layout fits lola_ft's {family.title} class. On other code of the model, stock PEFT finds no experts "
            "to adapt, warns, and gives wrong results. For such code, convert the adapter with "
            "`lola-ft convert --layout per_expert`."
        ]
    return []


def _licence(facts: CardFacts) -> str:
    family, terms = facts.family, facts.terms
    change = "adds low-rank updates to" if facts.kind == "adapter" else "changes"
    if terms.licence:
        text = f"The card of {_base(facts)} names {_named_licence(facts)} as its licence. This model {change} its "
        text += "weights, so that licence applies to it too."
    elif family is not None and family.licence_name:
        text = f"[{family.title}]({family.authors_url}) is published by its authors under {family.licence_name}. "
        text += f"This model {change} its weights and is under the same licence."
    else:
        text = "The licence of the base applies to this model too."
    return f"## Licence\n\n{text}{_gate(facts)}"


def _named_licence(facts: CardFacts) -> str:
    terms = facts.terms
    name = terms.name or terms.licence
    link = _licence_link(facts)
    return f"[{name}]({link})" if link else f"`{name}`"


def _licence_link(facts: CardFacts) -> str | None:
    """Return the address of the licence's text; a bare file name means a file in the base's repository."""
    link = facts.terms.link
    if link is None or "://" in link:
        return link
    known = facts.published or is_repo_id(facts.base)
    return f"https://huggingface.co/{facts.base}/blob/main/{link.removeprefix('./')}" if known else None


def _gate(facts: CardFacts) -> str:
    if not facts.terms.gate:
        return ""
    said = f" Its authors ask:\n\n> {facts.terms.request}" if facts.terms.request else ""
    return f"\n\nThe base is gated: to download it, accept its authors' terms on the Hub first.{said}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def merge_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the card's table about merging, as far as the report has the facts."""
    rows = [
        ["merged", f"{report.get('applied')} of {report.get('adapter_tensors')} adapter tensors{_replaced(report)}"]
    ]
    if layout := report.get("adapter_layout"):
        rows.append(["adapter's layout", f"`{layout}`"])
    rows.append(["merged into", _added_to(report)])
    if "changed" in report:
        rounded = f", {report['rounded']} more rounded to NF4" if report.get("rounded") else ""
        counts = f"{report['changed']} changed{rounded}, {report['copied']} the same as in the base"
        rows.append(["weights", f"{counts}, dtype {report['dtype']}"])
    return rows + _checks(report)


def _replaced(report: dict[str, Any]) -> str:
    replaced, biases = report.get("replaced", 0), report.get("biases", 0)
    of_biases = f" ({biases} biases)" if biases else ""
    return f"; {replaced} of them are fully trained weights{of_biases}" if replaced else ""


def _added_to(report: dict[str, Any]) -> str:
    if report.get("base_kind") == "nf4":
        return "the dequantised 4-bit weights (the original weights were not used)"
    return "the weights rounded to NF4" if report.get("rounding") == "nf4" else "the original weights"


def _checks(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows about the checks; `merge_report.json` has them in full."""
    rows = []
    if found := report.get("weights"):
        what = (
            f"{found['untouched']} tensors equal to the base's, {found['applied_once']} of {report['adapter_tensors']} "
            f"adapter tensors found exactly once, {len(found['sample'])} weights recomputed completely "
            "(`merge_report.json`)"
        )
        rows.append(["checked in the files", what])
    if same := report.get("verification"):
        what = (
            f"differ by at most {same['max_logit_difference']:.2g} (largest {same['largest_logit']:.3g}), same next "
            f"token at {same['top1_agreement']:.1%} of {same['tokens']} positions"
        )
        rows.append(["logits against base plus adapter", what])
    return rows
