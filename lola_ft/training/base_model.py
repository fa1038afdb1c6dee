"""A run's base model and adapter: found once, held against the recipe, loaded and saved.

The only file of training that knows how bases are opened. What needs PEFT and bitsandbytes is imported by the
functions that load and save: plans and previews do without them.
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
"""Counts of a loaded base by part and format, from the audit."""


@dataclass(frozen=True)
class OpenBase:
    """A base that was found.

    Attributes:
        name: The folder or Hub id that the recipe gives.
        revision: The recipe's; of a base on the Hub the commit that it stands for today.
        folder: Where its config, its tokenizer and, if they were asked for, its weights are.
        checkpoint: Its weights, checked; None if they were not asked for.
        start: The adapter that training goes on from, if it is not a fresh one.
    """

    name: str
    revision: str
    folder: Path
    architecture: Architecture
    checkpoint: BaseCheckpoint | None = None
    start: StartingAdapter | None = None

    def tokenizer(self, special_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
        """Load the tokenizer, checked against the vocabulary, with these special tokens added where it lacks them."""
        return self._with_added(special_tokens)[0]

    def trained_tokens(self, special_tokens: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of special tokens, in order, and those that the tokenizer lacked."""
        if not special_tokens:
            return (), ()
        tokenizer, new = self._with_added(special_tokens)
        ids, added = (set(tokenizer.convert_tokens_to_ids(list(names))) for names in (special_tokens, new))
        return tuple(sorted(ids)), tuple(sorted(added))

    def trained_architecture(self, recipe: Recipe) -> Architecture:
        """Return the architecture in training: with further rows of embeddings where new tokens find no free ones."""
        ids, rows = self.trained_tokens(recipe.data.special_tokens)[0], self.architecture.sizes.vocab
        return self.architecture.with_vocabulary(grown_vocabulary(ids, rows))

    def _with_added(self, names: Sequence[str]) -> tuple[PreTrainedTokenizerFast, list[str]]:
        """Return the tokenizer with these special tokens, and those among them that it lacked.

        Raises:
            UserError: A name that is an ordinary token.
        """
        tokenizer = load_tokenizer(self.folder, self.architecture.config, names)
        known, vocabulary = special_tokens(tokenizer), tokenizer.get_vocab()
        if ordinary := [name for name in names if name in vocabulary and name not in known]:
            raise UserError(
                f"data.special_tokens: '{ordinary[0]}' is an ordinary token of this base already, which texts use. "
                "Choose another name."
            )
        new = [name for name in dict.fromkeys(names) if name not in known]
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in new], special_tokens=True)
        return tokenizer, new


def open_base(name: str, revision: str, weights: bool) -> OpenBase:
    """Find a base in a folder or on the Hub; only with `weights` are these checked, and downloaded if need be."""
    folder = resolve_folder(name, revision) if weights else text_folder(name, revision)
    checkpoint = BaseCheckpoint.open(folder) if weights else None
    architecture = checkpoint.architecture if checkpoint else open_config(folder)[1]
    return OpenBase(name, commit_of(name, folder) or revision, folder, architecture, checkpoint)


def continue_recipe(recipe: Recipe, base: OpenBase) -> Recipe:
    """Fit a recipe to the adapter that it goes on from, which must be one of this base; pin the adapter to its commit.

    Raises:
        UserError: The adapter is of another base, does not fit this one, or was trained with other settings.
    """
    if (start := base.start) is None:
        return recipe
    weights = start.weights(base.architecture)
    _refuse_other_base(start, weights, base)
    recipe = continued(recipe, settings_of(weights), base.architecture.num_experts, start.special_tokens())
    if weights.token_ids != base.trained_tokens(recipe.data.special_tokens)[0]:
        raise UserError(
            f"adapter.continue_from: {start.name} has trained rows for tokens that the tokenizer of {base.name} has "
            "other ids for. Give base.model the adapter's own base, with its tokenizer."
        )
    if start.revision is None:
        return recipe
    adapter = recipe.adapter.model_copy(update={"revision": start.revision})
    return recipe.model_copy(update={"adapter": adapter})


def _refuse_other_base(start: StartingAdapter, weights: AdapterWeights, base: OpenBase) -> None:
    """Compare fingerprints; where the adapter has none, the names on the Hub, or else nothing is known."""
    own, named = weights.base_fingerprint, weights.base
    if own and base.checkpoint and (found := fingerprint(base.checkpoint)) != own:
        raise UserError(
            f"adapter.continue_from: {start.name} was trained on base {own}{f' ({named})' if named else ''}; "
            f"{base.name} is {found}. Give base.model the adapter's own base."
        )
    on_hub = is_repo_id(named) and is_repo_id(base.name) and not Path(base.name).exists()
    if not own and on_hub and named != base.name:
        raise UserError(
            f"adapter.continue_from: {start.name} was trained on base {named}, and base.model is {base.name}. Give "
            "base.model the adapter's own base; if both are the same weights, change base_model_name_or_path in its "
            "adapter_config.json."
        )


def fit_recipe(recipe: Recipe, base: OpenBase, console: Console) -> Recipe:
    """Hold a recipe to what its base has: groups, experts, routers, packing, positions; pin the base to its commit.

    What is asked for and not there is refused. What only a default asks for is changed, and said.
    """
    losses = {f"router.{name}": "router" for name in ("aux_loss", "z_loss") if getattr(recipe.router, name)}
    settings, sizes = adapter_settings(recipe), base.architecture.sizes
    base.architecture.require(settings.wanted() | losses)
    if settings.selection:
        check_selection(settings.selection, len(sizes.moe_layers), sizes.num_experts)
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


def adapter_settings(recipe: Recipe, token_ids: Sequence[int] | None = None) -> AdapterSettings:
    """Return the recipe's adapter and router sections, and the file of selected experts, as plain settings.

    Args:
        token_ids: Of the recipe's special tokens; None stands for as many of any ids, where only sizes matter.
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
    """Load a base with a fresh adapter on it, or the one to go on from, all else frozen.

    Returns:
        The model, and the base's sizes in memory by part.
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
    """Write the adapter, with tokenizer and templates for its users, whole or not at all; returns its layout."""
    from lola_ft import adapters

    def write_companions(partial: Path) -> None:
        if tokenizer is not None and template is not None:
            write_texts(partial, tokenizer, template)

    layout = adapters.fitting_layout(model)
    adapters.save_adapter(model, folder, layout, write_companions)
    return layout


def write_texts(folder: Path, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate) -> None:
    """Write a tokenizer whose chat template writes prompts as training did, and the prompt template.

    Where another token than the end of text ends an answer, `generation_config.json` says that both stop generation.
    """
    tokenizer.chat_template = chat_source(template, tokenizer)
    tokenizer.save_pretrained(folder)
    if isinstance(template, Template):
        (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    end, eos = template.end_of(tokenizer), eos_of(tokenizer)
    if end != eos:
        stops = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [end, eos]}
        write_text(folder / GENERATION_FILE, json.dumps(stops, indent=2) + "\n")
