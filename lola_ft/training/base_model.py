"""A run's base model and adapter: found once, held against the recipe, loaded and saved.

The only file of training that knows how bases are opened. What needs PEFT and bitsandbytes is imported by the
functions that load and save: plans and previews do without them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import PreTrainedTokenizerFast

from lola_ft.adapters import AdapterSettings
from lola_ft.adapters.selection import read_selection
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint, open_config
from lola_ft.checkpoints.folder import TEMPLATE_FILE, commit_of, resolve_folder, text_folder
from lola_ft.checkpoints.tokenizer import load_tokenizer
from lola_ft.console import Console
from lola_ft.errors import UserError
from lola_ft.families import Architecture
from lola_ft.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

SizesByPart: TypeAlias = dict[str, dict[str, int]]
"""Counts of a loaded base by part and format, from the audit."""


@dataclass(frozen=True)
class OpenBase:
    """A base that was found.

    Attributes:
        name: The folder or Hub id that the recipe gives.
        revision: The recipe's; of a base on the Hub the commit that it stands for today.
        folder: Where its config, its tokenizer and, if they were asked for, its weights are.
        checkpoint: Its weights, checked; None if they were not asked for.
    """

    name: str
    revision: str
    folder: Path
    architecture: Architecture
    checkpoint: BaseCheckpoint | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer, checked against the vocabulary."""
        return load_tokenizer(self.folder, self.architecture.config)


def open_base(name: str, revision: str, weights: bool) -> OpenBase:
    """Find a base in a folder or on the Hub; only with `weights` are these checked, and downloaded if need be."""
    folder = resolve_folder(name, revision) if weights else text_folder(name, revision)
    checkpoint = BaseCheckpoint.open(folder) if weights else None
    architecture = checkpoint.architecture if checkpoint else open_config(folder)[1]
    return OpenBase(name, commit_of(name, folder) or revision, folder, architecture, checkpoint)


def fit_recipe(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Hold a recipe to what its base has: groups, routers, packing, positions; pin the base to its commit.

    What is asked for and not there is refused. What only a default asks for is changed, and said.
    """
    losses = {f"router.{name}": "router" for name in ("aux_loss", "z_loss") if getattr(recipe.router, name)}
    base.architecture.require(adapter_settings(recipe).wanted() | losses)
    routing = base.architecture.family.routing
    if recipe.router.aux_loss and routing is not None and routing.balance is None:
        raise UserError(
            f"router.aux_loss: the authors of {base.architecture.family.title} balance the load without a loss, so "
            "there is none to weigh. Remove the key."
        )
    recipe = _fit_length(_fit_packing(recipe, base, console), base, console)
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"revision": base.revision})})


def _fit_packing(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Leave packing out where the family's attention would mix the documents of a row."""
    family = base.architecture.family
    if family.packs or not recipe.data.packing:
        return recipe
    reason = f"the attention of {family.title} models (transformers') does not keep packed rows apart"
    if "packing" in recipe.data.model_fields_set:
        raise UserError(f"data.packing: {reason}. Set data.packing=false.")
    console.print(f"Rows are not packed: {reason}.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})


def _fit_length(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Hold sequences to the base's positions."""
    sizes = base.architecture.sizes
    wanted, most = recipe.data.max_length, sizes.positions
    if wanted <= most:
        return recipe
    if "max_length" in recipe.data.model_fields_set:
        learned = "learned " if base.architecture.family.positions == "learned" else ""
        raise UserError(
            f"data.max_length: {wanted} is more than the {most} {learned}positions of {recipe.base.model}. "
            f"Set data.max_length={most} or less."
        )
    console.print(f"Sequences are at most {most} tokens long: {recipe.base.model} has no more positions.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": most})})


def adapter_settings(recipe: Recipe) -> AdapterSettings:
    """Return the recipe's adapter and router sections, and the file of selected experts, as plain settings."""
    adapter, router = recipe.adapter, recipe.router
    groups = {
        "attention": adapter.attention,
        "mlp": adapter.mlp,
        "shared_experts": adapter.shared_experts,
        "experts": adapter.experts,
    }
    given = {name: group for name, group in groups.items() if group is not None}
    ranks = {name: group.rank for name, group in given.items()}
    return AdapterSettings(
        attention_rank=ranks.get("attention"),
        mlp_rank=ranks.get("mlp"),
        shared_rank=ranks.get("shared_experts"),
        expert_rank=ranks.get("experts"),
        router_rank=router.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        alphas={name: group.alpha for name, group in given.items() if group.alpha is not None},
        dropouts={name: group.dropout for name, group in given.items() if group.dropout is not None},
        rslora=adapter.variant == "rslora",
        dora=adapter.variant == "dora",
        init=adapter.init,
        selection=read_selection(adapter.experts.select) if adapter.experts else None,
        tune_router=router.mode == "tuned",
        tune_norms=adapter.norms,
        tune_biases=adapter.biases,
    )


def load_with_adapter(
    base: OpenBase, recipe: Recipe, dtype: torch.dtype, device: torch.device, console: Console
) -> tuple["PeftModel", SizesByPart]:
    """Load a base with a fresh adapter on it, all else frozen; returns the base's sizes in memory by part, too."""
    from lola_ft.adapters import add_adapter
    from lola_ft.adapters.loftq import start_at_rounding_error
    from lola_ft.quantization import audit
    from lola_ft.quantization.load import load_checkpoint

    assert base.checkpoint is not None, "a base is opened with its weights to be loaded"
    model = load_checkpoint(base.checkpoint, base.name, recipe.base.quantization, dtype, device, quiet=console.quiet)
    sizes = audit(model).as_dict()
    settings = adapter_settings(recipe)
    with_adapter = add_adapter(model, settings)
    if settings.init == "loftq":
        console.print(start_at_rounding_error(with_adapter, base.checkpoint))
    return with_adapter, sizes


def save_adapter(
    model: "PeftModel", folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, template: str = ""
) -> str:
    """Write the adapter, with tokenizer and prompt template for its users, whole or not at all; returns its layout."""
    from lola_ft import adapters

    def write_companions(partial: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
            (partial / TEMPLATE_FILE).write_text(template, encoding="utf-8")

    layout = adapters.fitting_layout(model)
    adapters.save_adapter(model, folder, layout, write_companions)
    return layout
