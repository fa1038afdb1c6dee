"""A run's base model and adapter: found once, compared with the recipe, loaded and saved.

This is the only file of training that knows how bases are opened. PEFT and bitsandbytes are imported inside the
functions that load and save, because plans and previews do not need them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lola_ft.adapters import AdapterSettings
from lola_ft.adapters.layouts import grown_vocabulary
from lola_ft.adapters.selection import check_selection, read_selection
from lola_ft.adapters.stored_settings import settings_of
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint, open_config
from lola_ft.checkpoints.fingerprint import fingerprint
from lola_ft.checkpoints.folder import GENERATION_FILE, TEMPLATE_FILE, commit_of, resolve_folder, text_folder
from lola_ft.checkpoints.tokenizer import load_tokenizer
from lola_ft.console import Console
from lola_ft.data import PromptTemplate, Template, chat_source
from lola_ft.data.turns import eos_of, special_tokens
from lola_ft.errors import UserError
from lola_ft.families import Architecture
from lola_ft.files import write_text
from lola_ft.recipe import Recipe
from lola_ft.repo_id import is_repo_id
from lola_ft.training.continued_recipe import continued
from lola_ft.training.starting_adapter import StartingAdapter

if TYPE_CHECKING:
    from peft import PeftModel

SizesByPart: TypeAlias = dict[str, dict[str, int]]
"""Sizes of a loaded base by part and number format, from the audit."""


@dataclass(frozen=True)
class OpenBase:
    """A base model that was found and opened.

    Attributes:
        name: The folder or Hub id that the recipe gives.
        revision: The recipe's revision; for a base on the Hub, the commit that it names today.
        folder: The folder of its config, its tokenizer and, if requested, its weights.
        checkpoint: Its checked weights; None if they were not requested.
        start: The adapter to continue training from; None for a fresh adapter.
    """

    name: str
    revision: str
    folder: Path
    architecture: Architecture
    checkpoint: BaseCheckpoint | None = None
    start: StartingAdapter | None = None

    def tokenizer(self, special_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
        """Load the tokenizer, check it against the vocabulary, and add the special tokens that it lacks."""
        return self._with_added(special_tokens)[0]

    def trained_tokens(self, special_tokens: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the sorted ids of special tokens, and the sorted ids of those that the tokenizer lacked."""
        if not special_tokens:
            return (), ()
        tokenizer, new = self._with_added(special_tokens)
        ids, added = (set(tokenizer.convert_tokens_to_ids(list(names))) for names in (special_tokens, new))
        return tuple(sorted(ids)), tuple(sorted(added))

    def trained_architecture(self, recipe: Recipe) -> Architecture:
        """Return the architecture in training, with more embedding rows if new tokens need them."""
        ids, rows = self.trained_tokens(recipe.data.special_tokens)[0], self.architecture.sizes.vocab
        return self.architecture.with_vocabulary(grown_vocabulary(ids, rows))

    def _with_added(self, names: Sequence[str]) -> tuple[PreTrainedTokenizerFast, list[str]]:
        """Return the tokenizer with the special tokens added, and the tokens that it lacked.

        Raises:
            UserError: A name is already an ordinary token.
        """
        tokenizer = load_tokenizer(self.folder, self.architecture.config, names)
        known, vocabulary = special_tokens(tokenizer), tokenizer.get_vocab()
        if ordinary := [name for name in names if name in vocabulary and name not in known]:
            raise UserError(
                f"data.special_tokens: '{ordinary[0]}' is already an ordinary token of this base, which texts use. "
                "Choose another name."
            )
        new = [name for name in dict.fromkeys(names) if name not in known]
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in new], special_tokens=True)
        return tokenizer, new


def open_base(name: str, revision: str, weights: bool) -> OpenBase:
    """Find a base in a folder or on the Hub; with `weights`, download them if needed and check them."""
    folder = resolve_folder(name, revision) if weights else text_folder(name, revision)
    checkpoint = BaseCheckpoint.open(folder) if weights else None
    architecture = checkpoint.architecture if checkpoint else open_config(folder)[1]
    return OpenBase(name, commit_of(name, folder) or revision, folder, architecture, checkpoint)


def continue_recipe(recipe: Recipe, base: OpenBase) -> Recipe:
    """Complete a recipe with the settings of the adapter that it continues; pin the adapter to its commit.

    Raises:
        UserError: The adapter belongs to another base, does not fit this base, or was trained with other settings.
    """
    if (start := base.start) is None:
        return recipe
    weights = start.weights(base.architecture)
    _refuse_other_base(start, weights, base)
    recipe = continued(recipe, settings_of(weights), base.architecture.num_experts, start.special_tokens())
    if weights.token_ids != base.trained_tokens(recipe.data.special_tokens)[0]:
        raise UserError(
            f"adapter.continue_from: {start.name} has trained special tokens that have other ids in the tokenizer of "
            f"{base.name}. Set base.model to the adapter's own base, with its tokenizer."
        )
    if start.revision is None:
        return recipe
    adapter = recipe.adapter.model_copy(update={"revision": start.revision})
    return recipe.model_copy(update={"adapter": adapter})


def _refuse_other_base(start: StartingAdapter, weights: AdapterWeights, base: OpenBase) -> None:
    """Raise UserError if the fingerprints differ or, without a fingerprint, if the names on the Hub differ."""
    own, named = weights.base_fingerprint, weights.base
    if own and base.checkpoint and (found := fingerprint(base.checkpoint)) != own:
        raise UserError(
            f"adapter.continue_from: {start.name} was trained on base {own}{f' ({named})' if named else ''}; "
            f"{base.name} is {found}. Set base.model to the adapter's own base."
        )
    on_hub = is_repo_id(named) and is_repo_id(base.name) and not Path(base.name).exists()
    if not own and on_hub and named != base.name:
        raise UserError(
            f"adapter.continue_from: {start.name} was trained on base {named}, and base.model is {base.name}. Set "
            "base.model to the adapter's own base; if both are the same weights, change base_model_name_or_path in "
            "the adapter's adapter_config.json."
        )


def fit_recipe(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Check a recipe against its base (groups, experts, router, packing, positions); pin the base to its commit.

    A setting in the recipe that the base does not support raises UserError. A default that the base does not support
    is changed, and a line is printed.
    """
    losses = {f"router.{name}": "router" for name in ("aux_loss", "z_loss") if getattr(recipe.router, name)}
    settings, sizes = adapter_settings(recipe), base.architecture.sizes
    base.architecture.require(settings.wanted() | losses)
    if settings.selection:
        check_selection(settings.selection, len(sizes.moe_layers), sizes.num_experts)
    routing = base.architecture.family.routing
    if recipe.router.aux_loss and routing is not None and routing.balance is None:
        raise UserError(
            f"router.aux_loss: {base.architecture.family.title} balances its load without a loss, so the key has no "
            "effect. Remove the key."
        )
    recipe = _fit_length(_fit_packing(recipe, base, console), base, console)
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"revision": base.revision})})


def _fit_packing(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Switch packing off if the family's attention would mix the documents of a row."""
    family = base.architecture.family
    if family.packs or not recipe.data.packing:
        return recipe
    reason = f"transformers' attention of {family.title} models cannot keep packed documents apart"
    if "packing" in recipe.data.model_fields_set:
        raise UserError(f"data.packing: {reason}. Set data.packing=false.")
    console.print(f"Rows are not packed: {reason}.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})


def _fit_length(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Limit sequences to the base's positions."""
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
    console.print(f"Sequences are at most {most} tokens long, because {recipe.base.model} has {most} positions.")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": most})})


def adapter_settings(recipe: Recipe, token_ids: Sequence[int] | None = None) -> AdapterSettings:
    """Return the recipe's adapter and router sections as plain settings, with the selected experts read from file.

    Args:
        token_ids: Ids of the recipe's special tokens; None uses placeholder ids, if only sizes matter.
    """
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
        token_ids=tuple(range(len(set(recipe.data.special_tokens))) if token_ids is None else token_ids),
    )


def load_with_adapter(
    base: OpenBase, recipe: Recipe, dtype: torch.dtype, device: torch.device, console: Console
) -> tuple["PeftModel", SizesByPart]:
    """Load a base with a fresh adapter, or with the adapter to continue; all other weights are frozen.

    Returns:
        The model, and the sizes of the base's parts in memory.
    """
    from lola_ft.adapters import add_adapter
    from lola_ft.adapters.load_save import add_reference, put_weights
    from lola_ft.adapters.loftq import start_at_rounding_error
    from lola_ft.adapters.peft_model import identity_of
    from lola_ft.adapters.token_rows import grow_embeddings, start_at_mean
    from lola_ft.quantization import audit
    from lola_ft.quantization.load import load_checkpoint

    assert base.checkpoint is not None, "a base is opened with its weights to be loaded"
    wanted, offload = recipe.base.quantization, recipe.base.offload
    model = load_checkpoint(base.checkpoint, base.name, wanted, dtype, device, quiet=console.quiet, offload=offload)
    sizes = audit(model).as_dict()
    token_ids, new_ids = base.trained_tokens(recipe.data.special_tokens)
    settings = adapter_settings(recipe, token_ids)
    rows = base.trained_architecture(recipe).sizes.vocab
    if rows > base.architecture.sizes.vocab:
        console.print(f"The embeddings grow from {base.architecture.sizes.vocab:,} to {rows:,} rows for new tokens.")
        identity_of(model)
        grow_embeddings(model, rows)
    if base.start:
        weights, dropouts = base.start.weights(base.architecture), settings.dropout_by_target(base.architecture.family)
        with_adapter = put_weights(model, weights, "default", trainable=True, dropouts=dropouts)
        if (recipe.train.reference, recipe.train.reference_pass) == ("adapter", "beside"):
            add_reference(with_adapter, weights)
        return with_adapter, sizes
    with_adapter = add_adapter(model, settings)
    start_at_mean(with_adapter, new_ids)
    if settings.init == "loftq":
        console.print(start_at_rounding_error(with_adapter, base.checkpoint))
    return with_adapter, sizes


def save_adapter(
    model: "PeftModel",
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    template: PromptTemplate | None = None,
) -> str:
    """Write the adapter with its tokenizer and templates, completely or not at all; returns the layout."""
    from lola_ft import adapters

    def write_companions(partial: Path) -> None:
        if tokenizer is not None and template is not None:
            write_texts(partial, tokenizer, template)

    layout = adapters.fitting_layout(model)
    adapters.save_adapter(model, folder, layout, write_companions)
    return layout


def write_texts(folder: Path, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate) -> None:
    """Write the prompt template, and the tokenizer with a chat template that writes prompts as in training.

    If answers end with another token than the end-of-text token, `generation_config.json` makes both stop generation.
    """
    tokenizer.chat_template = chat_source(template, tokenizer)
    tokenizer.save_pretrained(folder)
    if isinstance(template, Template):
        (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    end, eos = template.end_of(tokenizer), eos_of(tokenizer)
    if end != eos:
        stops = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [end, eos]}
        write_text(folder / GENERATION_FILE, json.dumps(stops, indent=2) + "\n")
