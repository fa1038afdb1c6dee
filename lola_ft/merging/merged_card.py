"""The model card of a merged folder, from the records of merge and run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lola_ft.card import BaseTerms, CardFacts, render_card
from lola_ft.families import Family
from lola_ft.file_names import CARD_FILE
from lola_ft.files import write_text
from lola_ft.merging.merge_report import MergeReport


def write_card(
    report: MergeReport, base: str, family: Family, terms: BaseTerms, record: dict[str, Any], folder: Path
) -> None:
    """Write `README.md`.

    Args:
        base: The base's Hub id, "" if it has none, because a local path means nothing on other machines.
        record: The manifest of the run that contains the adapter; {} without a run.
    """
    facts = CardFacts(
        title=f"{base.rpartition('/')[2] or family.title}, fine-tuned and merged",
        family=family,
        terms=terms,
        kind="merged",
        location="path/to/this/folder",
        published=False,
        base=base or f"a local {family.title} checkpoint",
        manifest=record,
        merge_report=asdict(report),
        files=tuple(sorted(file.name for file in folder.iterdir())),
    )
    write_text(folder / CARD_FILE, render_card(facts))
