"""Opening models one after another, asking each, and freeing its memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lola_ft.console import Console
from lola_ft.data import PromptTemplate
from lola_ft.errors import UserError
from lola_ft.generation.prompts import template_of
from lola_ft.memory import give_back_freed_memory
from lola_ft.open_model import OpenModel, PromptReader, open_subject, prompt_reader, saved_template
from lola_ft.subject import Subject, find_subject, is_adapted

T = TypeVar("T")


@dataclass(frozen=True)
class Opening:
    """Options for opening the models.

    Attributes:
        base: The base of the runs and adapters among the models.
        template: Name of the template to use in place of each model's own.
    """

    base: str | None = None
    quantization: str = "auto"
    template: str | None = None


def ask_each(
    models: Sequence[str],
    opening: Opening,
    ask: Callable[[OpenModel, PromptTemplate], T],
    console: Console,
    prepare: Callable[[list[tuple[PromptReader, PromptTemplate]]], None] | None = None,
) -> tuple[list[T], list[dict[str, Any]]]:
    """Ask every model; returns the results, and facts about each model.

    Args:
        prepare: Called before any weights are loaded, with each model's tokenizer and template.

    Raises:
        UserError: A model is missing or given twice, or a base is given that none needs. Raised before loading.
    """
    refuse_twice(models)
    refuse_needless_base(models, opening.base)
    subjects = [find_subject(model, _base_for(model, opening.base)) for model in models]
    common = None if opening.template else _common_template(subjects)
    readers = [prompt_reader(subject) for subject in subjects]
    templates = [template_of(reader, opening.template, common) for reader in readers]
    if prepare:
        prepare(list(zip(readers, templates, strict=True)))
    answers, facts = list[T](), list[dict[str, Any]]()
    for model, subject, template in zip(models, subjects, templates, strict=True):
        console.print(f"{model} ({subject.kind}) …")
        opened = open_subject(subject, opening.quantization)
        answers.append(ask(opened, template))
        facts.append({"model": model, "kind": subject.kind, **how_loaded(opened), "template": template.source})
        del opened
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        give_back_freed_memory()
    if len({fact["quantization"] for fact in facts}) > 1:
        console.print(
            "Some models were read in 4 bit and others not, so differences include rounding. Use --quantization nf4 "
            "(or none) to read all in the same form.",
        )
    return answers, facts


def refuse_twice(models: Sequence[str]) -> None:
    """Raise UserError for a model that is given twice, because results are stored by name."""
    if len(set(models)) < len(models):
        raise UserError("The same model is given twice. Give each model once.")


def refuse_needless_base(models: Sequence[str], base: str | None) -> None:
    """Raise UserError for a base that no run or adapter needs."""
    if base and not any(is_adapted(Path(model)) for model in models):
        raise UserError("--base is for runs and adapters, and none of the models is one. Leave it out.")


def _common_template(subjects: Sequence[Subject]) -> PromptTemplate | None:
    """Return the template of the trained models, if all of them have the same one; else None."""
    found = [saved_template(subject) for subject in subjects]
    templates = {template.source: template for template in found if template is not None}
    return next(iter(templates.values())) if len(templates) == 1 else None


def _base_for(model: str, base: str | None) -> str | None:
    """Return the given base for a run or an adapter; None for a base or a merged model."""
    return base if is_adapted(Path(model)) else None


def how_loaded(opened: OpenModel) -> dict[str, str]:
    """Return the fingerprint of a model's base weights, its quantisation and its dtype."""
    return {
        "base_fingerprint": opened.fingerprint,
        "quantization": opened.quantization,
        "dtype": str(opened.causal.dtype).removeprefix("torch."),
    }
