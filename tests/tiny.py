"""The tiny base that many tests use, as a config and as an architecture."""

from typing import Any

from lola_ft.families import Architecture, architecture_of
from lola_ft.model import LolaConfig


def tiny_config(**changes: Any) -> LolaConfig:
    """Four layers, four experts, hidden 64, without dropout."""
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_inner": 128,
        "num_experts": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.1,
    }
    return LolaConfig(**settings | changes)


TINY: Architecture = architecture_of(tiny_config())
