"""A base's terms, from its own card: read, and repeated in the card of what is made from it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lola_ft.card import BaseTerms, read_terms, render_card
from lola_ft.families import FAMILIES
from tests.card.test_card import REPORT, facts

GATED = """---
license: other
license_name: open-moe
license_link: LICENSE.txt
extra_gated_heading: Before you take it
extra_gated_prompt: >-
  Do no harm with it.
extra_gated_fields:
  Name: text
---
# A base
"""


def card_in(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def test_licence_and_gate_are_read_from_the_cards_header(tmp_path: Path) -> None:
    terms = read_terms(card_in(tmp_path, GATED))
    assert (terms.licence, terms.name, terms.link) == ("other", "open-moe", "LICENSE.txt")
    assert terms.request == "Before you take it Do no harm with it."
    assert terms.gate["extra_gated_fields"] == {"Name": "text"}
    assert read_terms(card_in(tmp_path, "---\nlicense:\n- mit\n- apache-2.0\n---\n")).licence == "mit, apache-2.0"
    assert len(read_terms(card_in(tmp_path, f"---\nextra_gated_prompt: {'word ' * 200}\n---\n")).request) <= 302


@pytest.mark.parametrize("text", ["# No header", "---\nlicense: [\n---\n", "---\n- a\n- list\n---\n", ""])
def test_a_card_that_says_nothing_or_is_damaged_states_no_terms(text: str, tmp_path: Path) -> None:
    assert read_terms(card_in(tmp_path, text)) == BaseTerms()
    assert read_terms(tmp_path / "nowhere") == read_terms(None) == BaseTerms()


def test_the_new_card_names_licence_and_gate(tmp_path: Path) -> None:
    terms, family = read_terms(card_in(tmp_path, GATED)), FAMILIES["mixtral"]
    card = ModelCard(render_card(facts(terms=terms, family=family, base="org/base")))
    link = "https://huggingface.co/org/base/blob/main/LICENSE.txt"
    assert card.data.to_dict() | {"license": "other", "license_name": "open-moe", "license_link": link} == (
        card.data.to_dict()
    )
    assert f"names [open-moe]({link}) as its licence" in card.text
    assert "The base is gated" in card.text
    assert "> Before you take it Do no harm with it." in card.text
    local = ModelCard(render_card(facts(kind="merged", merge_report=REPORT, terms=terms, published=False, base="here")))
    assert "license_link" not in local.data.to_dict()
    assert "names `open-moe` as its licence" in local.text


def test_without_a_card_the_familys_licence_is_named() -> None:
    assert ModelCard(render_card(facts())).data.license == "cc-by-4.0"
    unknown = ModelCard(render_card(facts(family=FAMILIES["mixtral"])))
    assert unknown.data.license is None
    assert "The licence of the base applies to this model too." in unknown.text
