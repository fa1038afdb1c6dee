"""The kinds of dense models that can be a baseline, and what each calls the layers that LOLA's groups mean."""

import json
from dataclasses import dataclass
from pathlib import Path

from lola_ft.checkpoints.folder import resolve_folder
from lola_ft.errors import CheckpointError

FAMILY_KEY = "family"
"""In a manifest's `base`, of a baseline alone."""


@dataclass(frozen=True)
class Family:
    """A kind of dense model.

    Attributes:
        name: Its `model_type`.
        attention, mlp: The ends of the names of each group's linear layers.
        in_by_out: Whether these are stored in×out (transformers' `Conv1D`).
        packs: Whether its attention keeps the documents of a packed row apart.
    """

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    in_by_out: bool
    packs: bool

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The targets by the recipe's names."""
        return {"attention": self.attention, "mlp": self.mlp}


FAMILIES = {
    family.name: family
    for family in (
        Family("gpt2", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), in_by_out=True, packs=True),
        Family(
            "bloom",
            ("self_attention.query_key_value", "self_attention.dense"),
            ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            in_by_out=False,
            packs=False,  # transformers gives its attention no position ids, so it cannot see where a document begins
        ),
    )
}


def family_of(path: str | Path, revision: str | None = None) -> Family | None:
    """The family of a base's folder or Hub id; None of LOLA, and of anything else."""
    try:
        return family_in(resolve_folder(path, revision))
    except CheckpointError:
        return None  # whoever opens it says what is wrong


def family_in(folder: Path) -> Family | None:
    """The family that a folder's `config.json` names."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return FAMILIES.get(str(config.get("model_type"))) if isinstance(config, dict) else None
