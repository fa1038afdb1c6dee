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
        adapter_tensors: Number of tensors of the adapter. An expert's A and B count one each, also if they are stacked.
        applied: Number of adapter tensors that were merged, each once.
        replaced: Number of these that are fully trained weights (router, norms, biases), which replace the base's.
        biases: Number of the replaced ones that are biases.
        changed: Number of base tensors that the adapter changed.
        rounded: Number of base tensors that only 4-bit rounding changed.
        copied: Number of base tensors written without a change, except for a cast.
        dropped: Names of legacy buffers and copies of tied weights that were left out.
        largest_change: Largest absolute update of any weight, in float32.
        weights: Proof from the written files (`WeightProof`); None if it was not asked for.
        verification: Comparison of logits (`Verification`); None if it was skipped.
        effects: The effects of rounding on loss and logits (`Effects`); None if the comparison was skipped.
        stages: The runs that led to the adapter, oldest first, if their manifest exists.
        skipped: The reason why logits were not compared; "" if they were.
        other_code: Python files of the base that were kept besides lola_ft's code, which the config names; [] without
            such code.
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
