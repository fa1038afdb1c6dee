"""What is known once everything the user gave has been checked, and what a run's `manifest.json` says of it."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from lola_ft.baseline.either import family_in_memory
from lola_ft.baseline.families import FAMILY_KEY
from lola_ft.environment import hardware, library_versions
from lola_ft.recipe import Recipe
from lola_ft.repo_id import is_repo_id
from lola_ft.training import processes
from lola_ft.training.dataset import RunData
from lola_ft.training.precision import Precision
from lola_ft.training.working_copy import git_state


@dataclass(frozen=True)
class Prepared:
    """Everything that must be right before the first byte is written."""

    recipe: Recipe
    device: torch.device
    precision: Precision
    tokenizer: PreTrainedTokenizerFast
    data: RunData
    model: PeftModel
    audit: dict[str, dict[str, int]]
    trained: dict[str, tuple[int, int]]


def manifest_of(
    prepared: Prepared,
    base: Any,
    results: dict[str, Any],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a finished run. The same recipe on the same machine gives the same, but for `measured`.

    Args:
        base: The base model, which knows its id and fingerprint.
        results: What training came to.
        measured: Sections of what differs from run to run: timings, memory, energy.
    """
    recipe = prepared.recipe
    return {
        "recipe": recipe.model_dump(mode="json"),
        "code": git_state(),
        "versions": library_versions(),
        "hardware": hardware() | {"processes": processes.count()},
        "seeds": {"train": recipe.train.seed, "data": recipe.train.seed},
        "base": {
            "id": base.base_id,
            "revision": recipe.base.revision if is_repo_id(recipe.base.model) else None,
            "fingerprint": base.base_fingerprint,
            "dtype": str(prepared.precision.dtype).removeprefix("torch."),
            "parts": prepared.audit,
            **({FAMILY_KEY: family.name} if (family := family_in_memory(base)) else {}),
        },
        "trained": {
            group: {"tensors": tensors, "parameters": parameters}
            for group, (tensors, parameters) in prepared.trained.items()
        },
        "data": prepared.data.as_dict(),
        "results": results,
        **measured,
    }


def timings_of(prepare_s: float, train_s: float, tokens: int, resumed_from: int | None) -> dict[str, Any]:
    """How long it took; after a resume, `train_s` has the time before it too, and `prepare_s` is the last one's."""
    timings: dict[str, Any] = {
        "prepare_s": round(prepare_s, 1),
        "train_s": round(train_s, 1),
        "tokens_per_s": round(tokens / max(train_s, 1e-9), 1),
        "measured": "wall clock; train_s holds evaluations and checkpoints too, tokens are without padding",
    }
    return timings if resumed_from is None else timings | {"resumed_from_step": resumed_from}
