"""An adapter's numbers under the Hub's names, whatever layout they are stored in.

Every module that has LoRA on disk's terms, each expert's projection included, has one pair of matrices here; merging,
converting and loading all start from this form.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lola_ft.adapters.announced import announced_modules
from lola_ft.adapters.targets import TIED_MODULES, TIED_REASON, target_of
from lola_ft.errors import AdapterError

EXPERT_MODULE = re.compile(r"^(?P<experts>.+\.moe\.experts)\.(?P<expert>\d+)\.(?P<proj>c_fc|c_proj)$")


@dataclass(frozen=True)
class LoraPair:
    """The update of one 2-D weight: `scaling * b @ a`, out×in (the Hub stores all but the router in×out).

    Attributes:
        a: (R, in).
        b: (out, R).
        alpha: The update's strength before it is divided by R (or its root, for rsLoRA).
        magnitude: Learned lengths of the weight's output rows (out,), with DoRA.
    """

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class AdapterWeights:
    """A whole adapter.

    Attributes:
        pairs: By Hub module name, such as `transformer.h.1.moe.experts.3.c_fc`.
        trained: Weights trained as they are (the router's, the norms', biases), by Hub tensor name.
        base_biases: The base's biases of experts that are left alone: `peft` holds a layer's as one stack.
        bias_experts: Experts whose biases the file says it holds, by layer; None if it says nothing.
        rslora: Scale by alpha / sqrt(rank) in place of alpha / rank.
        base: The base's Hub id, or "".
        revision: Of the base on the Hub, if it is not its main branch.
        base_fingerprint: Identity of the base's weights, if it is known.
        starts_at_rounding_error: It corrects the rounding of the 4-bit base (LoftQ), and belongs on that.
        announced: The config of a file of another tool, which must hold all that this says; None for one of ours.
        keys: Names in the file that it was read from, by module (A's and B's) or trained weight.
    """

    pairs: dict[str, LoraPair]
    trained: dict[str, Tensor] = field(default_factory=dict)
    base_biases: dict[str, Tensor] = field(default_factory=dict)
    bias_experts: Mapping[str, Collection[int]] | None = None
    rslora: bool = False
    base: str = ""
    revision: str | None = None
    base_fingerprint: str | None = None
    starts_at_rounding_error: bool = False
    announced: Mapping[str, Any] | None = None
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def scaling(self, module: str) -> float:
        pair = self.pairs[module]
        return pair.alpha / (pair.rank**0.5 if self.rslora else pair.rank)

    def delta(self, module: str) -> Tensor:
        """The update of `module`'s Hub weight as the Hub stores it, float32 (LoRA, arXiv 2106.09685); without DoRA."""
        pair = self.pairs[module]
        delta_OI = torch.mm(pair.b.float(), pair.a.float()).mul_(self.scaling(module))
        return delta_OI if is_out_by_in(module) else delta_OI.t().contiguous()

    @property
    def dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def tensor_count(self) -> int:
        """How many stored tensors this is in the per-expert layout."""
        return sum(2 + (pair.magnitude is not None) for pair in self.pairs.values()) + len(self.trained)

    def biases(self) -> list[str]:
        """Names of the trained biases; a LayerNorm's that is trained with its weight is not counted."""
        return [
            name
            for name in self.trained
            if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" not in self.trained
        ]

    def experts_of(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Ids of the experts that have LoRA or trained biases, by layer; layers where all of them do are left out."""
        found = _experts_in([*self.pairs, *(name.removesuffix(".bias") for name in self.trained)])
        return {layer: ids for layer, ids in found.items() if len(ids) < num_experts}

    def untrained_biases(self, num_experts: int) -> list[str]:
        """Names of the biases that a layer's stack has beside the trained ones."""
        return [
            f"{layer}.{e}.{projection}.bias"
            for layer, ids in self.experts_with_biases().items()
            for e in range(num_experts)
            for projection in ("c_fc", "c_proj")
            if e not in ids
        ]

    def experts_with_biases(self) -> dict[str, tuple[int, ...]]:
        """Ids of the experts whose biases are trained, by layer."""
        return _experts_in(name.removesuffix(".bias") for name in self.trained)

    def keep_experts(self, experts_of: Mapping[str, Collection[int]]) -> None:
        """Drop pairs and biases of experts that are not named; layers that are not named stay whole."""
        for name in [*self.pairs, *self.trained]:
            match = EXPERT_MODULE.match(name.removesuffix(".bias"))
            if match and int(match["expert"]) not in experts_of.get(match["experts"], (int(match["expert"]),)):
                self.pairs.pop(name, None)
                self.keys.pop(name, None)
                if name in self.trained:
                    self.base_biases[name] = self.trained.pop(name)

    def check_against(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse an adapter that does not fit a checkpoint's tensors (Hub names and shapes, in×out).

        Raises:
            AdapterError: Naming every module that does not fit.
        """
        problems = []
        for module, pair in self.pairs.items():
            shape = shapes.get(f"{module}.weight")
            update = (pair.a.shape[1], pair.b.shape[0])
            if is_out_by_in(module):
                update = (update[1], update[0])
            if shape is None:
                problems.append(f"{module}: the base has no such module{_reason(module)}")
            elif tuple(shape) != update:
                problems.append(f"{module}: the adapter changes a {list(update)} weight, the base's is {list(shape)}")
        for name, tensor in self.trained.items():
            if name not in shapes:
                problems.append(f"{name}: the base has no such tensor")
            elif tuple(shapes[name]) != tuple(tensor.shape):
                problems.append(f"{name}: {list(tensor.shape)} in the adapter, {list(shapes[name])} in the base")
        problems += [f"{name}: the adapter trains the biases and lacks this one" for name in self._missing(shapes)]
        lost = self._not_held(shapes)
        problems += lost
        if problems:
            shown = "\n  ".join(problems[:5]) + (f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else "")
            hint = "\nWhat was left out on purpose must not stand in adapter_config.json." if lost else ""
            raise AdapterError(f"The adapter does not fit this base:\n  {shown}{hint}")

    def _not_held(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What the file's config announces and the file does not hold."""
        if self.announced is None:
            return []
        lora, trained = announced_modules(self.announced, shapes)
        lost = self._lost([module for module in lora if module not in self.pairs])
        return [
            f"{module}: adapter_config.json says that it has LoRA, but the file holds none{_reason(module)}"
            for module in lost
        ] + [
            f"{module}: adapter_config.json says that it was trained, but the file does not hold it"
            for module in trained
            if f"{module}.weight" not in self.trained
        ]

    def _lost(self, announced: list[str]) -> list[str]:
        """Of announced modules without LoRA, those of a kind of which others have it; the other kinds are said.

        A config's `c_proj` means attention, dense layers and experts at once; a file may have left some of them out.
        """
        held = {target_of(module, "peft") for module in self.pairs}
        kinds = {module: target_of(module, "peft") for module in announced}
        left_out = sorted({kind for kind in kinds.values() if kind and held and kind not in held})
        if left_out:
            warnings.warn(
                f"adapter_config.json names {', '.join(left_out)}; the adapter holds none of it.", stacklevel=4
            )
        return [module for module, kind in kinds.items() if kind not in left_out]

    def _missing(self, names: Collection[str]) -> list[str]:
        """The biases that an adapter with trained biases should hold, and does not."""
        if not self.biases():
            return []
        # A file that does not say which experts it is about is about all of them, or none.
        of_all = self.bias_experts is None and bool(self.experts_with_biases())

        def wanted(name: str) -> bool:
            match = EXPERT_MODULE.match(name.removesuffix(".bias"))
            return (
                match is None or of_all or int(match["expert"]) in (self.bias_experts or {}).get(match["experts"], ())
            )

        return [name for name in names if name.endswith(".bias") and name not in self.trained and wanted(name)]


def _reason(module: str) -> str:
    """Why some modules cannot have LoRA."""
    return f". {TIED_REASON}" if module.endswith(TIED_MODULES) else ""


def _experts_in(modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Ids of the experts among these modules, by layer."""
    found: dict[str, set[int]] = {}
    for module in modules:
        if match := EXPERT_MODULE.match(module):
            found.setdefault(match["experts"], set()).add(int(match["expert"]))
    return {layer: tuple(sorted(ids)) for layer, ids in found.items()}


def is_out_by_in(module: str) -> bool:
    """Whether the Hub stores this module's weight out×in: the router's alone; all others are in×out."""
    return module.endswith(".moe.gate")
