"""A run's base model and adapter: found once, held against the recipe, loaded and saved.

The only file of training that knows how bases are opened. What needs PEFT and bitsandbytes is imported by the
functions that load and save: plans and previews do without them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lola_ft.adapters import AdapterSettings
from lola_ft.adapters.selection import read_selection
from lola_ft.baseline.checkpoint import DenseCheckpoint, read_dense_config
from lola_ft.baseline.families import FAMILIES, FAMILY_KEY, family_in
from lola_ft.baseline.settings import check_settings
from lola_ft.errors import UserError
from lola_ft.model.hub_checkpoint import TEMPLATE_FILE, HubCheckpoint, resolve_folder
from lola_ft.model.tokenizer import load_tokenizer, read_config, text_folder
from lola_ft.planning.dense.config import DenseConfig
from lola_ft.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

SizesByPart: TypeAlias = dict[str, dict[str, int]]
"""Counts of a loaded base by part and format, from the audit."""


@dataclass(frozen=True)
class OpenBase:
    """A base that was found.

    Attributes:
        folder: Where its config, its tokenizer and, if they were asked for, its weights are.
        checkpoint: Its weights, checked; None if they were not asked for.
    """

    name: str
    revision: str
    folder: Path
    config: PretrainedConfig
    checkpoint: HubCheckpoint | DenseCheckpoint | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer, checked against the vocabulary."""
        return load_tokenizer(self.folder, self.config)


def open_base(name: str, revision: str, weights: bool) -> OpenBase:
    """Find a base in a folder or on the Hub.

    Args:
        weights: Check them; without, those of a base on the Hub are not downloaded.

    Raises:
        CheckpointError: No such base, or one that cannot be used.
    """
    if weights:
        folder = resolve_folder(name, revision)
        checkpoint = DenseCheckpoint.open(folder) if family_in(folder) else HubCheckpoint.open(folder)
        return OpenBase(name, revision, folder, checkpoint.config, checkpoint)
    folder = text_folder(name, revision)
    config = read_dense_config(folder) if family_in(folder) else read_config(folder)
    return OpenBase(name, revision, folder, config)


def fit_groups(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Hold a recipe to what its base has: everything for LOLA, less for a dense model; without packing for a BLOOM.

    Raises:
        UserError: The base is dense, and the recipe asks for what only LOLA has, or for packing where none is possible.
    """
    family = FAMILIES.get(base.config.model_type)
    if family is None:
        return recipe
    check_settings(adapter_settings(recipe), family.name)
    if losses := [key for key in ("aux_loss", "z_loss") if getattr(recipe.router, key)]:
        raise UserError(
            f"router.{losses[0]}: the base is a dense model ({family.name}), which has no router. Remove it."
        )
    if recipe.hub:
        raise UserError(f"hub: what is published is LOLA's; the base is a dense model ({family.name}). Remove it.")
    if family.packs or not recipe.data.packing:
        return recipe
    reason = f"the attention of {family.name} models (transformers') does not keep packed rows apart"
    if "packing" in recipe.data.model_fields_set:
        raise UserError(f"data.packing: {reason}. Set data.packing=false.")
    console.print(f"Rows are not packed: {reason}.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})


def fit_length(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Hold sequences to the base's positions.

    Raises:
        UserError: The recipe asks for more; if only the default does, a note is printed.
    """
    wanted, most = recipe.data.max_length, base.config.n_positions
    if wanted <= most:
        return recipe
    if "max_length" in recipe.data.model_fields_set:
        raise UserError(
            f"data.max_length: {wanted} is more than the {most} learned positions of {recipe.base.model}. "
            f"Set data.max_length={most} or less."
        )
    console.print(f"Sequences are at most {most} tokens long: {recipe.base.model} has no more positions.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": most})})


def adapter_settings(recipe: Recipe) -> AdapterSettings:
    """Return the recipe's adapter and router sections as plain settings.

    Raises:
        UserError: If the file that selects experts cannot be read.
    """
    adapter, router = recipe.adapter, recipe.router
    groups = {"attention": adapter.attention, "mlp": adapter.mlp, "experts": adapter.experts}
    given = {name: group for name, group in groups.items() if group is not None}
    ranks = {name: group.rank for name, group in given.items()}
    return AdapterSettings(
        attention_rank=ranks.get("attention"),
        mlp_rank=ranks.get("mlp"),
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


def planning_config(config: PretrainedConfig) -> PretrainedConfig | DenseConfig:
    """Return a base's config as the planner takes it."""
    return DenseConfig.of(config) if config.model_type in FAMILIES else config


def load_with_adapter(
    base: OpenBase, recipe: Recipe, dtype: torch.dtype, device: torch.device, console: Console
) -> tuple["PeftModel", SizesByPart]:
    """Load a base with a fresh adapter on it, everything else frozen.

    Returns:
        The model, and the sizes of the base's parts as they are held in memory.
    """
    from lola_ft.adapters.loftq import start_at_rounding_error
    from lola_ft.baseline.either import add_adapter, load_base
    from lola_ft.quantization import audit

    quantization = None if recipe.base.quantization == "none" else recipe.base.quantization
    model = load_base(base.name, quantization, dtype, device, base.revision, quiet=console.quiet)
    sizes = audit(model).as_dict()
    settings = adapter_settings(recipe)
    with_adapter = add_adapter(model, settings)
    if settings.init == "loftq":
        assert isinstance(base.checkpoint, HubCheckpoint), "loftq is refused for a dense base"
        console.print(start_at_rounding_error(with_adapter, base.checkpoint))
    return with_adapter, sizes


def save_adapter(
    model: "PeftModel", folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, template: str = ""
) -> str:
    """Write the adapter's folder whole or not at all; returns the layout in which it is.

    Args:
        tokenizer, template: Written beside the adapter for who uses it, the prompt template as text.
    """
    from lola_ft.adapters import fitting_layout
    from lola_ft.baseline import either

    def write_companions(partial: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
            (partial / TEMPLATE_FILE).write_text(template, encoding="utf-8")

    layout = fitting_layout(model)
    either.save_adapter(model, folder, layout, write_companions)
    return layout


def fingerprint_of(model: "PeftModel") -> str:
    """Return the fingerprint of the weights that the adapter is trained on."""
    fingerprint: str = model.get_base_model().base_fingerprint
    return fingerprint


def family_record(base: PreTrainedModel) -> dict[str, str]:
    """Return the manifest's entry about a dense base's family; {} for LOLA."""
    family = FAMILIES.get(base.config.model_type)
    return {FAMILY_KEY: family.name} if family else {}


def write_dense_card(output: Path, manifest: dict[str, Any]) -> bool:
    """Write the card of a run on a dense base; returns False, and writes nothing, for a run on LOLA."""
    from lola_ft.baseline import card

    family = FAMILIES.get(manifest["base"].get(FAMILY_KEY))
    if family:
        card.write_dense_card(output, manifest, family, manifest["recipe"]["base"]["model"])
    return family is not None
