"""Texts in a few languages, and profiles of the tiny base on them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_ft.routing.profile import About, Profile
from lola_ft.routing.profiling import profile_routing

TEXTS = {
    "sw": "Jina langu ni Amina.\n\nMoja mbili tatu nne tano.\n\n" + "Nyumba kubwa na ndogo. " * 12,
    "en": "One two three four five six seven.\n\nred green blue\n\n" + "a house is a house, " * 14,
    "de": "Eins zwei drei vier fünf sechs.\n\nrot grün blau und ein Haus",
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text file for each of three languages; read only."""
    folder = tmp_path_factory.mktemp("texts")
    for language, text in TEXTS.items():
        (folder / f"{language}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def profile(tiny_base: Path, texts: Path) -> Profile:
    """A profile of the tiny base on these texts."""
    return profile_routing(tiny_base, [texts], quantization=None, device="cpu", sample=40)


@pytest.fixture(scope="session")
def made_profile() -> Callable[..., Profile]:
    """Makes a profile of given counts (L, M, E), as if each token had an id of its own language."""

    def make(languages: Sequence[str], counts: Any, **about: Any) -> Profile:
        counts_LME = torch.as_tensor(counts)
        tokens_L = counts_LME[:, 0].sum(-1)
        num = len(languages)
        plain: dict[str, Any] = {
            "model": "made",
            "kind": "base",
            "base_fingerprint": "0" * 16,
            "quantization": "none",
            "layers": tuple(range(1, 2 * counts_LME.shape[1], 2)),
            "hidden_size": 64,
            "inner_size": 128,
            "vocab_size": 320,
            "max_length": 128,
        }
        probs = counts_LME / tokens_L[:, None, None]
        return Profile(
            about=About(**plain | about),
            languages=tuple(languages),
            counts_LME=counts_LME,
            mean_probs_LME=probs.float(),
            mean_gates_LME=(probs / 2).float(),
            tokens_L=tokens_L,
            bytes_L=tokens_L * 4,
            documents_L=torch.ones(num, dtype=torch.int64),
            token_kinds_L=torch.ones(num, dtype=torch.int64),
            token_ids=torch.arange(num, dtype=torch.int32),
            token_counts=tokens_L.int(),
            choices_SM=torch.zeros(num, counts_LME.shape[1], dtype=torch.uint8),
            sampled_L=torch.ones(num, dtype=torch.int64),
            sample_digests=tuple(f"{place:016x}" for place in range(num)),
        )

    return make
