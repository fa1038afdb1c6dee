"""A family with one config: all tensors and sizes of one base, and the error for a feature that the base lacks."""

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from lola_ft.errors import UserError
from lola_ft.families.family import Family, Sizes
from lola_ft.families.place import LORA_GROUPS, Place


@dataclass(frozen=True)
class Architecture:
    """A family with one config: every tensor and size of one base.

    Attributes:
        config: transformers' config of the base.
    """

    family: Family
    config: Any = field(repr=False)

    @cached_property
    def sizes(self) -> Sizes:
        return self.family.sizes(self.config)

    @cached_property
    def places(self) -> dict[str, Place]:
        """All tensors of a checkpoint by Hub name, in the order of the layers."""
        return self.family.places(self.config)

    @property
    def num_experts(self) -> int:
        return self.sizes.num_experts

    @property
    def total_parameters(self) -> int:
        """Number of weights in a checkpoint. Tied weights count once."""
        return sum(prod(place.shape) for place in self.places.values())

    @property
    def active_parameters(self) -> int:
        """Number of weights that multiply each token: without unused experts and without embeddings.

        Embeddings are only looked up. Tied ones are also the output head, and count as that.
        """
        sizes, tokens = self.sizes, self.places[self.family.embeddings[0]]
        numels = {name: prod(place.shape) for name, place in self.places.items() if place.group != "embeddings"}
        in_experts = sum(numel for name, numel in numels.items() if self.places[name].expert is not None)
        unused = in_experts * (sizes.num_experts - sizes.top_k) // sizes.num_experts if in_experts else 0
        return sum(numels.values()) - unused + (prod(tokens.shape) if self.tied_modules else 0)

    @cached_property
    def matrices(self) -> dict[tuple[int | None, str], list[tuple[int, int]]]:
        """(outputs, inputs) of the linear layers, in order, by layer and group; experts are left out."""
        found: dict[tuple[int | None, str], list[tuple[int, int]]] = {}
        for place in self.places.values():
            if place.group in LORA_GROUPS and place.expert is None and len(place.shape) == 2:
                found.setdefault((place.layer, place.group), []).append(place.out_in)
        return found

    @cached_property
    def norm_modules(self) -> tuple[str, ...]:
        """Last parts of the normalisation layers' names, as PEFT's `modules_to_save` takes them."""
        return self._last_names("norms", ".weight")

    @cached_property
    def router_modules(self) -> tuple[str, ...]:
        """The routers' names for PEFT's `modules_to_save`: long enough to match no other module."""
        return tuple(self._module_to_save(module) for module in self.family.targets.get("router", ()))

    def is_in_router(self, module: str) -> bool:
        """Return True if a module in memory is a router or a part of one."""
        return any(f".{target}." in f"{module}." for target in self.family.targets.get("router", ()))

    def trained_module(self, name: str) -> str:
        """Return the `modules_to_save` name of the module that owns a fully trained weight, from its Hub name."""
        module = self.family.in_memory(name.rpartition(".")[0])
        routers = (target for target in self.family.targets.get("router", ()) if f".{target}." in f"{module}.")
        return next(map(self._module_to_save, routers), module.rpartition(".")[2])

    def _module_to_save(self, router: str) -> str:
        """Return a router's name for `modules_to_save`: its last part, or all of it if that would match other modules.

        PEFT takes every module whose name ends with it: `gate` would also take a `shared_expert_gate`.
        """
        last = router.rpartition(".")[2]
        others = (place.module for place in self.places.values() if place.group != "router")
        return router if any(module.endswith(last) for module in others) else last

    @cached_property
    def bias_names(self) -> tuple[str, ...]:
        """Hub names of all biases."""
        return tuple(name for name in self.places if name.endswith(".bias"))

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Names of input embeddings and output head, if they are one tensor."""
        _, head = self.family.embeddings
        return () if head in self.places else tuple(name.split(".")[-2] for name in self.family.embeddings)

    @property
    def tied_reason(self) -> str:
        """The reason why input embeddings and output head cannot have LoRA, for a message."""
        embeddings, head = self.tied_modules
        return (
            f"{self.family.title}'s embeddings ({embeddings}) and output head ({head}) are one tensor, so two updates "
            "of it contradict each other and could not be merged."
        )

    @property
    def features(self) -> tuple[str, ...]:
        """The parts that can be trained: groups for LoRA, norms, biases."""
        beside = [name for name, has in (("norms", self.norm_modules), ("biases", self.bias_names)) if has]
        held = {place.group for place in self.places.values()}
        return (*(group for group in self.family.lora_groups if group in held), *beside)

    def with_vocabulary(self, rows: int) -> "Architecture":
        """Return the architecture with this number of embedding rows; itself if it has this number already."""
        if rows == self.sizes.vocab:
            return self
        config = copy.deepcopy(self.config)
        config.vocab_size = rows
        return Architecture(self.family, config)

    def group_of(self, name: str) -> str | None:
        """Return the group of a module or parameter in memory, by its name with or without PEFT's wrappers."""
        own = _WRAPPERS.sub("", _ADDED.split(name)[0])
        return self._groups.get(own) or self._groups.get(own.rpartition(".")[0])

    @cached_property
    def _groups(self) -> dict[str, str]:
        places = list(self.places.values())
        modules = {place.module: place.group for place in reversed(places)}  # the first tensor decides
        return modules | {place.parameter: place.group for place in places}

    def kind_of(self, name: str) -> Place | None:
        """Return a tensor whose name differs only in numbers (layer, expert), to tell what a name means; else None."""
        return self._kinds.get(_without_numbers(name))

    @cached_property
    def _kinds(self) -> dict[str, Place]:
        return {_without_numbers(name): place for name, place in reversed(self.places.items())}

    def _last_names(self, group: str, ending: str) -> tuple[str, ...]:
        found = (name for name, place in self.places.items() if place.group == group and name.endswith(ending))
        return tuple(dict.fromkeys(name.split(".")[-2] for name in found))

    def require(self, wanted: Mapping[str, str], has: Collection[str] | None = None) -> None:
        """Check that this family has the features that are asked for.

        Args:
            wanted: The features, by the key that asks for them: `{"adapter.experts": "experts"}`.
            has: The features that exist; by default `features`.

        Raises:
            UserError: If some are missing. The message names every key, the missing features and the existing ones.
        """
        known = self.features if has is None else has
        missing = {key: feature for key, feature in wanted.items() if feature not in known}
        if missing:
            lacks = " and no ".join(dict.fromkeys(missing.values()))
            raise UserError(
                f"{', '.join(missing)}: the base is of the family {self.family.title} ({self.family.model_type}), "
                f"which has no {lacks}. It has {', '.join(known)}. Leave {'them' if len(missing) > 1 else 'it'} out, "
                "or choose another base."
            )

    def refuse_offload(self, in_4_bit: bool, device: str, processes: int = 1) -> None:
        """Refuse `base.offload: experts` if experts cannot be kept in host memory, or if nothing would be saved.

        Args:
            in_4_bit: The base is loaded in 4 bit.
            device: "cuda" or "cpu".
            processes: Number of processes that train together.

        Raises:
            UserError: Names the reason.
        """
        reasons = {
            f"a {self.family.title} has no experts": not self.sizes.moe_layers,
            "base.quantization is none": not in_4_bit,
            "there is no GPU here, and on a CPU they are in host memory in any case": device != "cuda",
            f"each of {processes} processes would keep a copy of them": processes > 1,
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            raise UserError(
                "base.offload: `experts` keeps the experts' 4-bit weights in host memory and brings them to the GPU "
                f"layer by layer, but {reason}. Set base.offload=none."
            )


_ADDED = re.compile(r"\.(?:lora_|parametrizations\.|token_adapter\.)")
"""The beginning of a name's part that an adapter adds to a module."""
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")
"""Parts that PEFT inserts into the names of modules."""


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
