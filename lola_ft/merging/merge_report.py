"""The report of a merge, which `merge_report.json` keeps."""

from dataclasses import dataclass, field
from typing import Any

from lola_ft.merging.effects import Effects
from lola_ft.merging.proof import WeightProof
from lola_ft.merging.verify import Verification


@dataclass(frozen=True)
class MergeReport:
    """The counts and checks of one merge.

    Attributes:
        base_fingerprint: Identity of the base's original weights.
        base_kind: `checkpoint`, or `nf4` if only the 4-bit form of the base existed.
        adapter_layout: `peft` or `per_expert`.
        dtype: The option; `auto` is the base's own.
        rounding: `base` or `nf4`: the weights that the update was added to.
        adapter_tensors: Tensors of the adapter (an expert's A and B count one each, also where they are stacked).
        applied: How many of them were merged, each once.
        replaced: Of the applied ones, fully trained weights (router, norms, biases), which replace the base's.
        biases: How many of the replaced ones are biases.
        changed: Base tensors that the adapter changed.
        rounded: Base tensors that only 4-bit rounding changed.
        copied: Base tensors written as they were (but for a cast).
        dropped: Legacy buffers and copies of tied weights that were left out, by name.
        largest_change: Largest absolute update of any weight, in float32.
        weights: Proof from the written files (`WeightProof`); None if it was not asked for.
        verification: Comparison of logits (`Verification`); None if it was skipped.
        effects: What rounding does to loss and logits (`Effects`); None if it was skipped.
        stages: The runs that led to the adapter, oldest first, if their manifest is there.
        skipped: Why logits were not compared; "" if they were.
        other_code: Python files of the base, kept beside our own code, which the config names; [] without code of ours.
    """

    base_fingerprint: str
    base_kind: str
    adapter_layout: str
    dtype: str
    rounding: str
    adapter_tensors: int
    applied: int
    changed: int
    rounded: int
    copied: int
    dropped: list[str]
    largest_change: float
    replaced: int = 0
    biases: int = 0
    weights: WeightProof | None = None
    verification: Verification | None = None
    effects: Effects | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    other_code: list[str] = field(default_factory=list)
