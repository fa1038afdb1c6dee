"""Models opened one after the other, asked, and freed."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from lola_ft.data import Template
from lola_ft.errors import UserError
from lola_ft.generation.prompts import template_of
from lola_ft.memory import give_back_freed_memory
from lola_ft.opening import OpenModel, find_subject, is_adapted, open_model

T = TypeVar("T")


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    Attributes:
        base: Of the runs and adapters among them.
        template: In place of each model's own.
    """

    base: str | None = None
    quantization: str = "auto"
    template: Template | None = None


def ask_each(
    models: Sequence[str], opening: Opening, ask: Callable[[OpenModel, Template], T], console: Console
) -> tuple[list[T], list[dict[str, Any]]]:
    """Ask every model; returns what each said, and what it is.

    Raises:
        UserError: A model that is not there, before any is loaded; or one given twice.
    """
    if len(set(models)) < len(models):
        raise UserError("The same model is given twice. Give each once.")
    subjects = [find_subject(model, _base_for(model, opening.base)) for model in models]
    answers, facts = list[T](), list[dict[str, Any]]()
    for model, subject in zip(models, subjects, strict=True):
        console.print(f"{model} ({subject.kind}) …", highlight=False, markup=False)
        opened = open_model(model, _base_for(model, opening.base), quantization=opening.quantization)
        template = template_of(opened, opening.template)
        answers.append(ask(opened, template))
        facts.append(
            {
                "model": model,
                "kind": subject.kind,
                "base_fingerprint": opened.fingerprint,
                "quantization": getattr(_causal(opened), "quantization", None) or "none",
                "dtype": str(_causal(opened).dtype).removeprefix("torch."),
                "template": template.source,
            }
        )
        del opened
        _free()
    return answers, facts


def _base_for(model: str, base: str | None) -> str | None:
    """The base of a run or an adapter; a base or merged model is its own."""
    return base if is_adapted(Path(model)) else None


def _causal(opened: OpenModel) -> Any:
    return opened.model.get_base_model() if opened.subject.adapter else opened.model


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_freed_memory()
