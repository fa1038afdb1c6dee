"""A tiny nano base: its settings, and text in two languages."""

import pytest

from lola_ft.nano import NanoSettings, build, cldr
from lola_ft.nano.cldr import Term
from lola_ft.nano.corpus import split_terms
from lola_ft.nano.declaration import find_declaration
from lola_ft.nano.pretrain import PretrainSettings

TINY = NanoSettings(
    n_embd=32,
    n_head=2,
    n_inner=64,
    num_experts=4,
    n_positions=64,
    vocab_size=512,
    english_passes=1,
    pretrain=PretrainSettings(steps=3, rows_per_step=2, row_length=64),
)


@pytest.fixture
def two_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are for the whole text; two languages do here."""
    use_two_languages(monkeypatch)


def use_two_languages(patch: pytest.MonkeyPatch) -> None:
    split = split_terms(english_and_swahili(), 0.1)
    declarations = {tag: find_declaration(tag) for tag in ("en", "sw")}
    patch.setattr(build, "load_split", lambda: split)
    patch.setattr(build, "load_declarations", lambda: declarations)


def english_and_swahili() -> tuple[Term, ...]:
    english = cldr._clean("en", set())
    return (*english, *cldr._clean("sw", {cldr.normalise(term.text) for term in english}))
