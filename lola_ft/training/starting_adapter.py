"""The adapter that a run goes on from (`adapter.continue_from`): found, checked before the base is, kept in the run.

The run's folder gets a copy (`start/`), and a resumed run reads that one: it needs the adapter itself no more, whatever
has become of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lola_ft.adapters.layouts import CONFIG_FILE, to_state, token_ids_in
from lola_ft.adapters.on_disk import WEIGHTS_FILE, StoredAdapter, ranks_and_alphas, read_adapter
from lola_ft.adapters.shared_inputs import sharing_inputs
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.card.stages import stages_in
from lola_ft.checkpoints.folder import CHAT_TEMPLATE_FILE, TEMPLATE_FILE, TOKENIZER_FILES, commit_of, resolve_folder
from lola_ft.console import Console
from lola_ft.data import CHAT, Template
from lola_ft.errors import AdapterError, CheckpointError, UserError
from lola_ft.families import Architecture
from lola_ft.file_names import ADAPTER_FOLDER, MANIFEST_FILE, START_FOLDER
from lola_ft.files import copy_files, replace_folder, sha256_of
from lola_ft.recipe.schema import Adapter
from lola_ft.subject import find_subject, run_around

_KEY = "adapter.continue_from"
_STAGES_FILE = "stages.json"


@dataclass(frozen=True)
class StartingAdapter:
    """An adapter to go on from, its file read and checked.

    Attributes:
        name: The run, folder or Hub id that the recipe gives.
        revision: The recipe's; of an adapter on the Hub the commit that it stands for today.
        stages: The stages that made it, oldest first (`card/stages.py`).
    """

    name: str
    revision: str | None
    stored: StoredAdapter
    stages: list[dict[str, Any]]

    def has_learned(self, template: str) -> bool:
        """Tell whether it was trained with this template, by a recipe's name for it; True where that is not known."""
        own, chat = self.stored.folder / TEMPLATE_FILE, self.stored.folder / CHAT_TEMPLATE_FILE
        if template == CHAT or not own.is_file():
            return not own.is_file() and (template == CHAT or not chat.is_file())
        return own.read_text(encoding="utf-8").strip() == Template.load(template).source.strip()

    def special_tokens(self) -> list[str]:
        """Return the tokens whose rows it has trained, in the order of their ids.

        Raises:
            UserError: There are such rows, and no tokenizer beside them that names their tokens.
        """
        ids = token_ids_in(self.stored.config)
        if ids and not any(self.stored.folder.glob("tokenizer*")):
            raise UserError(
                f"{_KEY}: {self.name} has trained rows of special tokens, and no tokenizer that names them."
            )
        return AutoTokenizer.from_pretrained(self.stored.folder).convert_ids_to_tokens(sorted(ids)) if ids else []

    def weights(self, architecture: Architecture) -> AdapterWeights:
        """Read its numbers for a base with these tensors.

        Raises:
            AdapterError: If it does not fit the base, or a model in memory cannot hold it.
        """
        weights = self.stored.weights(architecture.with_vocabulary(self.stored.vocabulary(architecture.sizes.vocab)))
        try:
            weights.check_fit()
            weights = sharing_inputs(weights)
            to_state(weights, "peft", weights.experts_of())
            ranks_and_alphas(weights, "peft")
        except AdapterError as error:
            raise AdapterError(f"{_KEY}: {self.name}: {error}") from error
        return weights

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest keeps of it."""
        return {
            "adapter": self.name,
            "revision": self.revision,
            "sha256": sha256_of(self.stored.folder / WEIGHTS_FILE),
        }


def find_start(adapter: Adapter, run: Path | None = None) -> StartingAdapter | None:
    """Find and check the adapter that a recipe's section `adapter` names; returns None if it names none.

    Args:
        run: The folder of the run to resume, which holds a copy.

    Raises:
        UserError: There is no such adapter, or it is damaged.
    """
    if adapter.continue_from is None:
        return None
    if run is not None:
        folder = run / START_FOLDER
        stages = json.loads((folder / _STAGES_FILE).read_text(encoding="utf-8")) if folder.is_dir() else []
        return StartingAdapter(adapter.continue_from, adapter.revision, read_adapter(folder), stages)
    folder, revision = _folder_of(adapter.continue_from, adapter.revision)
    return StartingAdapter(adapter.continue_from, revision, read_adapter(folder), _stages_of(folder))


def _folder_of(name: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the adapter's own folder and, for one on the Hub, its commit."""
    given = Path(name)
    if given.is_dir() and revision is not None:
        raise UserError(f"adapter.revision: belongs to an adapter on the Hub; {name} is a folder. Remove it.")
    try:
        folder = resolve_folder(name, revision)
    except CheckpointError as error:
        raise UserError(f"{_KEY}: {error} It takes a run, an adapter's folder or its Hub id.") from error
    if (folder / CONFIG_FILE).is_file():
        return folder, commit_of(name, folder) or revision
    subject = find_subject(folder, needs_base=False)
    if subject.adapter is None:
        inside = folder / ADAPTER_FOLDER
        hint = f" Did you mean {inside}?" if (inside / CONFIG_FILE).is_file() else ""
        raise UserError(f"{_KEY}: {name} is neither a run nor an adapter.{hint}")
    return subject.adapter, commit_of(name, folder) or revision


def _stages_of(folder: Path) -> list[dict[str, Any]]:
    """Return the stages that made an adapter, from the manifest of its run or, if it was published, beside it."""
    beside = folder / MANIFEST_FILE
    if not beside.is_file():
        return stages_in(run_around(folder)[1])
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return stages_in(manifest) if isinstance(manifest, dict) else []


def keep_start(start: StartingAdapter, run: Path) -> None:
    """Copy the adapter into the folder of the run that begins."""
    with replace_folder(run / START_FOLDER) as folder:
        copy_files(start.stored.folder, folder, (CONFIG_FILE, WEIGHTS_FILE, TEMPLATE_FILE, *TOKENIZER_FILES))
        (folder / _STAGES_FILE).write_text(json.dumps(start.stages, ensure_ascii=False, indent=2), encoding="utf-8")


def warn_of_other_template(start: StartingAdapter, template: str, console: Console) -> None:
    """Say so if the recipe's prompt template is not the one that the adapter has learned."""
    if not start.has_learned(template):
        console.print(
            f"Warning: data.template {template} is not the template that {start.name} was trained with: the model has "
            "to learn the new prompts first. Leave it so only if you mean it.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
