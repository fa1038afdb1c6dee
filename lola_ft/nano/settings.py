"""Settings of the nano base, and a family's config with as many active parameters per token as the nano LOLA."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from transformers import CONFIG_MAPPING

from lola_ft.errors import UserError
from lola_ft.families import FAMILIES, LOLA, Architecture, Family, Sizes
from lola_ft.nano.pretrain import PretrainSettings

TEXT_VERSION = 3
"""Version of the pre-training text; raise it when the text changes without a change of settings."""
TOP_K = 2
"""Experts per token in mixtures other than LOLA."""
WIDTH_STEP = 8
"""Inner widths are multiples of this, because experts' products in bfloat16 need rows of 16 bytes."""


@dataclass(frozen=True)
class NanoSettings:
    """All settings of the nano base, by LOLA's names. Two cores pre-train this size in two minutes.

    Attributes:
        embedding_std: Standard deviation of the embeddings at the start. Logits reach about `embedding_std * n_embd`,
            32 here and 41 in LOLA (0.02 * 2048). With LOLA's own 0.02 they reached 2.6, and an adapter, which does not
            change the embeddings, could not give any answer much probability.
        passes, english_passes: Passes over all terms, each time in different lists.
        names_share: Share of the lists of names that is trained on.
        declaration_passes: Passes over the declaration's sentences that are not held out.
    """

    n_embd: int = 128
    n_head: int = 2
    n_inner: int = 512
    n_layer: int = 2
    num_experts: int = 16
    n_positions: int = 512
    initializer_range: float = 0.05
    embedding_std: float = 0.25
    vocab_size: int = 6144
    passes: int = 1
    english_passes: int = 3
    names_share: float = 0.4
    declaration_passes: int = 2
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)

    def key(self, architecture: Architecture) -> str:
        """Return a hash of the settings and library versions; a built folder with the same key is used again."""
        record = asdict(self) | {name: version(name) for name in ("babel", "tokenizers", "torch")}
        record["text"] = TEXT_VERSION
        if architecture.family is not LOLA:  # LOLA's config follows from the settings
            record["config"] = architecture.config.to_dict()
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def nano_architecture(family: Family, settings: NanoSettings) -> Architecture:
    """Return a family's architecture at nano size.

    Vocabulary, hidden size, heads, layers and number of experts are those of the nano LOLA. The inner width is chosen
    so that about as many parameters are active per token.

    Raises:
        UserError: No such base can be pre-trained.
    """
    if not family.packs:
        possible = (name for name, other in FAMILIES.items() if other.packs)
        raise UserError(
            f"There is no nano base of {family.title} ({family.model_type}): its attention would mix the "
            f"documents of a packed row, and pre-training packs them. Choose one of {', '.join(possible)}."
        )
    lola = _of_width(LOLA, settings, settings.n_inner, top_k=1)
    if family is LOLA:
        return lola
    least, next_to_it = (_of_width(family, settings, width, TOP_K) for width in (WIDTH_STEP, 2 * WIDTH_STEP))
    per_step = next_to_it.active_parameters - least.active_parameters  # the same for every step of the width
    steps = round((lola.active_parameters - least.active_parameters) / per_step)
    if steps < 0:
        raise UserError(
            f"There is no nano base of {family.title} ({family.model_type}) with these settings: its narrowest form "
            f"has {least.active_parameters:,} active parameters per token, LOLA has {lola.active_parameters:,}. Raise "
            "n_inner."
        )
    return _of_width(family, settings, WIDTH_STEP * (1 + steps), TOP_K)


def _of_width(family: Family, settings: NanoSettings, width: int, top_k: int) -> Architecture:
    """Return a family at nano size with experts of a width; a dense layer is as wide as a token's experts together."""
    sizes = Sizes(
        vocab=settings.vocab_size,
        hidden=settings.n_embd,
        inner=width * top_k if family.experts else width,
        layers=settings.n_layer,
        heads=settings.n_head,
        positions=settings.n_positions,
        num_experts=settings.num_experts,
        expert_inner=width,
        top_k=top_k,
    )
    keys: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 1, "tie_word_embeddings": True}
    keys |= {"initializer_range": settings.initializer_range}
    return Architecture(family, CONFIG_MAPPING[family.model_type](**keys | family.config_keys(sizes)))
