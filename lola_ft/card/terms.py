"""The terms under which a base may be used, as its own card states them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from lola_ft.file_names import CARD_FILE

_GATE = "extra_gated_"
_LONGEST = 300  # letters of an authors' request that are quoted


@dataclass(frozen=True)
class BaseTerms:
    """The terms in the header of a base's card.

    Attributes:
        licence: The Hub's identifier; None if the card has none.
        name: The licence's name, for the identifier `other`.
        link: Address of the text, or the name of a file in the base's repository.
        gate: The header's keys `extra_gated_…`: the Hub's questions before a download. Empty for a base without a
            gate.
    """

    licence: str | None = None
    name: str | None = None
    link: str | None = None
    gate: dict[str, Any] = field(default_factory=dict)

    @property
    def request(self) -> str:
        """The authors' text at the gate, shortened to one line; "" if the card has none."""
        words = " ".join(_text(self.gate.get(f"{_GATE}{key}")) or "" for key in ("heading", "prompt")).split()
        text = " ".join(words)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} …"


def read_terms(folder: Path | None) -> BaseTerms:
    """Read the terms from the card in a checkpoint's folder; empty if there is no card or it cannot be read."""
    header = _header(folder / CARD_FILE) if folder else {}
    return BaseTerms(
        licence=_text(header.get("license")),
        name=_text(header.get("license_name")),
        link=_text(header.get("license_link")),
        gate={key: value for key, value in header.items() if str(key).startswith(_GATE)},
    )


def _header(file: Path) -> dict[str, Any]:
    try:
        return (metadata_load(file) if file.is_file() else None) or {}
    except Exception:  # other people's cards can be broken in any way; a broken one states no terms
        return {}


def _text(value: Any) -> str | None:
    if isinstance(value, list):  # the Hub also takes several licences
        value = ", ".join(str(one) for one in value)
    return str(value).strip() or None if value is not None else None
