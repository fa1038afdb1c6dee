"""The facts that a model card is made from."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lola_ft.card.terms import BaseTerms
from lola_ft.families import Family


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card can say; it leaves out unknown facts.

    Attributes:
        location: The repository's id; in a run's own card (not published), the adapter's folder.
        published: Whether `location` is a repository.
        base: The base's Hub id; in a run's own card, the recipe's `base.model`.
        family: The base's family; None if it is not known.
        terms: The base's terms of use, from its own card.
        base_revision: The base's commit if known, else its branch or tag.
        layout: The adapter's layout; None for merged weights.
        stock_peft: Whether stock PEFT loads the adapter.
        rows: Fewest embedding rows that fit the adapter's special tokens; 0 without special tokens.
        manifest: The run's `manifest.json`, possibly incomplete.
        merge_report: `merge_report.json` of merged weights.
        files: Names of the published files.
    """

    title: str
    kind: Literal["adapter", "merged"]
    location: str
    published: bool
    base: str
    family: Family | None
    terms: BaseTerms = field(default_factory=BaseTerms)
    base_revision: str | None = None
    layout: str | None = None
    stock_peft: bool = False
    rows: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)
    merge_report: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def recipe(self) -> dict[str, Any]:
        """The run's recipe with all defaults; {} if it is not known."""
        return self.manifest.get("recipe") or {}

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The recipe's sources of training rows."""
        return self.recipe.get("data", {}).get("sources", [])

    @property
    def datasets(self) -> list[str]:
        """Ids of the Hub's datasets among the sources."""
        return sorted({source["hub"] for source in self.sources if source.get("hub")})

    @property
    def languages(self) -> dict[str, dict[str, Any]]:
        """Counts of the training rows by language code."""
        return self.manifest.get("data", {}).get("train", {}).get("languages", {})

    @property
    def quantization(self) -> str | None:
        """The quantisation of the base in training: "nf4" or None."""
        stored = self.recipe.get("base", {}).get("quantization", "nf4")
        return None if stored == "none" else stored

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the base's weights; None if it is not known."""
        return self.manifest.get("base", {}).get("fingerprint") or self.merge_report.get("base_fingerprint")
