"""An adapter's weights by Hub names, independent of the layout that they are stored in.

Every module of the checkpoint with LoRA has one pair of matrices here, and so has each projection of each expert.
Merging, converting and loading all start from this form.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lola_ft.adapters.declared import declared_modules
from lola_ft.errors import AdapterError
from lola_ft.families import Architecture


@dataclass(frozen=True)
class LoraPair:
    """The update of one 2-D weight: `scaling * b @ a`, out×in.

    Attributes:
        a: (R, in).
        b: (out, R).
        alpha: Strength of the update: scaling is alpha / R, or alpha / sqrt(R) with rsLoRA.
        magnitude: With DoRA, the learned lengths of the weight's output rows (out,).
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
        architecture: The base's.
        pairs: LoRA pairs by Hub module name.
        trained: Fully trained weights (routers, norms, biases), by Hub tensor name.
        token_rows: Trained rows of embeddings and output head (K, D), by Hub tensor name.
        token_ids: The tokens that these rows belong to, in order.
        base_biases: The base's biases of experts that are not trained, because `peft` holds a layer's as one stack.
        bias_experts: Experts whose biases the file should hold, by layer, according to its metadata; None if it says
            nothing about them.
        rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
        base: The base's Hub id, "" for a local folder.
        revision: The commit of a base on the Hub.
        base_fingerprint: Identity of the base's weights, if it is known.
        starts_at_rounding_error: True if it corrects the rounding of the 4-bit base (LoftQ), and belongs to that base.
        declared: The config of a file of another tool, which must hold all declared modules; None for files of lola_ft.
        keys: Names in the file, by module (of A and B) or fully trained weight.
    """

    architecture: Architecture
    pairs: dict[str, LoraPair] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, Tensor] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    base_biases: dict[str, Tensor] = field(default_factory=dict)
    bias_experts: Mapping[str, Collection[int]] | None = None
    rslora: bool = False
    base: str = ""
    revision: str | None = None
    base_fingerprint: str | None = None
    starts_at_rounding_error: bool = False
    declared: Mapping[str, Any] | None = None
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def scaling(self, module: str) -> float:
        pair = self.pairs[module]
        return pair.alpha / (pair.rank**0.5 if self.rslora else pair.rank)

    def delta(self, module: str) -> Tensor:
        """Return the LoRA update of a weight in its stored orientation, float32 (arXiv 2106.09685), without DoRA."""
        pair = self.pairs[module]
        delta_OI = torch.mm(pair.b.float(), pair.a.float()).mul_(self.scaling(module))
        return delta_OI.t().contiguous() if self.is_in_by_out(module) else delta_OI

    def is_in_by_out(self, module: str) -> bool:
        """Return True if the checkpoint stores this module's weight in×out."""
        place = self.architecture.kind_of(f"{module}.weight")
        return place is not None and place.in_by_out

    @property
    def dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def tensor_count(self) -> int:
        """Return the number of tensors in the layout `per_expert`."""
        return sum(2 + (pair.magnitude is not None) for pair in self.pairs.values()) + (
            len(self.trained) + len(self.token_rows)
        )

    def biases(self) -> list[str]:
        """List the trained biases, without the bias of a norm that is trained together with its weight."""
        return [
            name
            for name in self.trained
            if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" not in self.trained
        ]

    def experts_of(self) -> dict[str, tuple[int, ...]]:
        """Return the ids of experts with LoRA or trained biases, by layer. Layers where all have them are left out."""
        found = self._experts_in([*self.pairs, *(name.removesuffix(".bias") for name in self.trained)])
        return {layer: ids for layer, ids in found.items() if len(ids) < self.architecture.num_experts}

    def untrained_biases(self) -> list[str]:
        """List the biases in a layer's stack that are not trained."""
        experts = self.architecture.family.experts
        return [
            f"{experts.name(layer, e, projection)}.bias"
            for layer, ids in self.experts_with_biases().items()
            for e in range(self.architecture.num_experts)
            for projection in (experts.projections if experts else ())
            if experts and e not in ids
        ]

    def experts_with_biases(self) -> dict[str, tuple[int, ...]]:
        """Return the ids of experts whose biases are trained, by layer."""
        return self._experts_in(name.removesuffix(".bias") for name in self.trained)

    def _experts_in(self, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the ids of the experts among these modules, by layer."""
        found: dict[str, set[int]] = {}
        for module in modules:
            if expert := self.architecture.family.parse_expert(module):
                found.setdefault(expert.module, set()).add(expert.expert)
        return {layer: tuple(sorted(ids)) for layer, ids in found.items()}

    def keep_experts(self, experts_of: Mapping[str, Collection[int]]) -> None:
        """Drop pairs and biases of experts that are not named. Layers that are not named keep all."""
        for name in [*self.pairs, *self.trained]:
            own = self.architecture.family.parse_expert(name.removesuffix(".bias"))
            if own and own.expert not in experts_of.get(own.module, (own.expert,)):
                self.pairs.pop(name, None)
                self.keys.pop(name, None)
                if name in self.trained:
                    self.base_biases[name] = self.trained.pop(name)

    def check_fit(self) -> None:
        """Check that the adapter fits its base's tensors.

        Raises:
            AdapterError: If modules do not fit. The message names all of them.
        """
        places = self.architecture.places
        problems = []
        for module, pair in self.pairs.items():
            place = places.get(f"{module}.weight")
            update = (pair.b.shape[0], pair.a.shape[1])
            if place is None:
                problems.append(f"{module}: the base has no such module{self._reason(module)}")
            elif len(place.shape) != 2 or place.out_in != update:
                stored = list(update[::-1] if place.in_by_out else update)
                problems.append(f"{module}: the adapter changes a {stored} weight, the base's is {list(place.shape)}")
        for name, tensor in self.trained.items():
            if name not in places:
                problems.append(f"{name}: the base has no such tensor")
            elif places[name].shape != tuple(tensor.shape):
                problems.append(f"{name}: {list(tensor.shape)} in the adapter, {list(places[name].shape)} in the base")
        for name, tensor in self.token_rows.items():
            rows, width = places[name].shape
            if tensor.shape != (len(self.token_ids), width) or not all(0 <= i < rows for i in self.token_ids):
                problems.append(
                    f"{name}: {list(tensor.shape)} in the adapter for the tokens {list(self.token_ids)}, "
                    f"{[rows, width]} in the base"
                )
        problems += [
            f"{name}: the adapter trains the biases, and this one is missing" for name in self._missing_biases()
        ]
        lost = self._not_held()
        problems += lost
        if problems:
            shown = "\n  ".join(problems[:5]) + (f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else "")
            hint = "\nIf tensors were left out on purpose, remove them from adapter_config.json too." if lost else ""
            family = self.architecture.family
            raise AdapterError(
                f"The adapter does not fit this base, a {family.title} model ({family.model_type}):\n  {shown}{hint}"
            )

    def _not_held(self) -> list[str]:
        """List the modules that the config declares and the file does not hold, each with the reason."""
        if self.declared is None:
            return []
        lora, trained = declared_modules(self.declared, self.architecture)
        lost = self._lost([module for module in lora if module not in self.pairs])
        return [
            f"{module}: adapter_config.json says that it has LoRA, but the file holds none{self._reason(module)}"
            for module in lost
        ] + [
            f"{module}: adapter_config.json says that it was trained, but the file does not hold it"
            for module in trained
            if f"{module}.weight" not in self.trained
        ]

    def _lost(self, declared: list[str]) -> list[str]:
        """Return the declared modules without LoRA whose kind has LoRA elsewhere; warn about the other kinds.

        A short name in a config may match attention, dense layers and experts at once, so a file may lack some kinds.
        """
        target_of = self.architecture.family.target_of
        held = {target_of(module, "peft") for module in self.pairs}
        kinds = {module: target_of(module, "peft") for module in declared}
        left_out = sorted({kind for kind in kinds.values() if kind and held and kind not in held})
        if left_out:
            warnings.warn(
                f"adapter_config.json names {', '.join(left_out)}, but the adapter's file has no LoRA tensors for "
                f"{'this name' if len(left_out) == 1 else 'these names'}. Nothing is loaded there.",
                stacklevel=4,
            )
        return [module for module, kind in kinds.items() if kind not in left_out]

    def _missing_biases(self) -> list[str]:
        """List the biases that an adapter with trained biases should hold but does not."""
        if not self.biases():
            return []
        # A file whose metadata names no experts must hold the biases of all experts, or of none.
        of_all = self.bias_experts is None and bool(self.experts_with_biases())

        def wanted(name: str) -> bool:
            own = self.architecture.family.parse_expert(name.removesuffix(".bias"))
            return own is None or of_all or own.expert in (self.bias_experts or {}).get(own.module, ())

        return [name for name in self.architecture.bias_names if name not in self.trained and wanted(name)]

    def _reason(self, module: str) -> str:
        """Return the end of a message that says why a module cannot have LoRA; "" if no reason is known."""
        tied = self.architecture.tied_modules
        return f". {self.architecture.tied_reason}" if tied and module.endswith(tied) else ""
