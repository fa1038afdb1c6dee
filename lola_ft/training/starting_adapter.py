"""The adapter that a run continues (`adapter.continue_from`). It is found and checked before the base is loaded.

The run's folder gets a copy (`start/`). A resumed run reads the copy, so the adapter itself may have changed or gone.
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
    """An adapter to continue training from, with its file read and checked.

    Attributes:
        name: The run, folder or Hub id that the recipe gives.
        revision: The recipe's revision; for an adapter on the Hub, the commit that it names today.
        stages: The runs that trained it, oldest first (`card/stages.py`).
    """

    name: str
    revision: str | None
    stored: StoredAdapter
    stages: list[dict[str, Any]]

    def has_learned(self, template: str) -> bool:
        """Tell whether the adapter was trained with a template, named as in a recipe; True if that is unknown."""
        own, chat = self.stored.folder / TEMPLATE_FILE, self.stored.folder / CHAT_TEMPLATE_FILE
        if template == CHAT or not own.is_file():
            return not own.is_file() and (template == CHAT or not chat.is_file())
        return own.read_text(encoding="utf-8").strip() == Template.load(template).source.strip()

    def special_tokens(self) -> list[str]:
        """Return the tokens whose rows the adapter has trained, in the order of their ids.

        Raises:
            UserError: The adapter has trained rows, but no tokenizer that names their tokens.
        """
        ids = token_ids_in(self.stored.config)
        if ids and not any(self.stored.folder.glob("tokenizer*")):
            raise UserError(
                f"{_KEY}: {self.name} has trained special tokens, but no tokenizer files that name them. Copy the "
                "tokenizer that it was trained with into its folder."
            )
        return AutoTokenizer.from_pretrained(self.stored.folder).convert_ids_to_tokens(sorted(ids)) if ids else []

    def weights(self, architecture: Architecture) -> AdapterWeights:
        """Read the adapter's weights for a base of this architecture.

        Raises:
            AdapterError: The adapter does not fit the base, or a model in memory cannot hold it.
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
        """Return the facts for the manifest."""
        return {
            "adapter": self.name,
            "revision": self.revision,
            "sha256": sha256_of(self.stored.folder / WEIGHTS_FILE),
        }


def find_start(adapter: Adapter, run: Path | None = None) -> StartingAdapter | None:
    """Find and check the adapter that `adapter.continue_from` names; None if the key is not set.

    Args:
        run: The folder of the run to resume, which holds a copy of the adapter.

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
    """Return the adapter's folder and, for an adapter on the Hub, its commit."""
    given = Path(name)
    if given.is_dir() and revision is not None:
        raise UserError(f"adapter.revision: is for an adapter on the Hub, and {name} is a folder. Remove it.")
    try:
        folder = resolve_folder(name, revision)
    except CheckpointError as error:
        raise UserError(f"{_KEY}: {error} Give a run, an adapter's folder or an adapter's Hub id.") from error
    if (folder / CONFIG_FILE).is_file():
        return folder, commit_of(name, folder) or revision
    subject = find_subject(folder, needs_base=False)
    if subject.adapter is None:
        inside = folder / ADAPTER_FOLDER
        hint = f" Did you mean {inside}?" if (inside / CONFIG_FILE).is_file() else ""
        raise UserError(f"{_KEY}: {name} is neither a run nor an adapter.{hint}")
    return subject.adapter, commit_of(name, folder) or revision


def _stages_of(folder: Path) -> list[dict[str, Any]]:
    """Return an adapter's stages from the manifest of its run or, for a published adapter, in its folder."""
    beside = folder / MANIFEST_FILE
    if not beside.is_file():
        return stages_in(run_around(folder)[1])
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return stages_in(manifest) if isinstance(manifest, dict) else []


def keep_start(start: StartingAdapter, run: Path) -> None:
    """Copy the adapter into the folder of the new run."""
    with replace_folder(run / START_FOLDER) as folder:
        copy_files(start.stored.folder, folder, (CONFIG_FILE, WEIGHTS_FILE, TEMPLATE_FILE, *TOKENIZER_FILES))
        (folder / _STAGES_FILE).write_text(json.dumps(start.stages, ensure_ascii=False, indent=2), encoding="utf-8")


def warn_of_other_template(start: StartingAdapter, template: str, console: Console) -> None:
    """Print a warning if the recipe's prompt template is not the one that the adapter was trained with."""
    if not start.has_learned(template):
        console.print(
            f"Warning: data.template {template} is not the template that {start.name} was trained with, so the model "
            "first has to learn the new prompts. Change the template unless you want that.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
