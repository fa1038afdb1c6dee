"""Experts: how an MoE layer fuses them in memory, and how a file names or fuses them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class ExpertName:
    """A Hub module name of one expert's projection, taken apart: fused module in memory, expert's id, projection."""

    module: str
    expert: int
    projection: str


@dataclass(frozen=True)
class ExpertLayout:
    """The names of an MoE layer's experts, fused in memory and on disk.

    Attributes:
        module: Ending of the fused module's name in memory, such as `moe.experts`.
        stacks: Each fused parameter in the order in which the module registers them, with the projections on disk
            that it holds side by side: one, or gate and up.
        on_disk: Ending of the name under which the experts are numbered on disk.
        fused: By fused parameter, the ending of the module whose weight holds it on disk for all experts, where a file
            does not number them: tensors of the file are then slices of it.
    """

    module: str
    stacks: Mapping[str, tuple[str, ...]]
    on_disk: str = ""
    fused: Mapping[str, str] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names on disk of an expert's matrices, in order."""
        return tuple(name for names in self.stacks.values() for name in names)

    @property
    def targets(self) -> tuple[str, ...]:
        """The fused parameters as PEFT's `target_parameters` name them."""
        return tuple(f"{self.module.rpartition('.')[2]}.{stack}" for stack in self.stacks)

    def stack_of(self, projection: str) -> str:
        """The fused parameter that holds a projection."""
        return next(stack for stack, names in self.stacks.items() if projection in names)

    def part_of(self, projection: str) -> tuple[int, int]:
        """Return which part of its stack a projection is, of how many: (0, 1) if alone, (1, 2) for up behind gate."""
        names = self.stacks[self.stack_of(projection)]
        return names.index(projection), len(names)

    def parse(self, module: str) -> ExpertName | None:
        """Take the Hub name of an expert's projection apart; None for any other module."""
        if match := self._pattern.match(module):
            return ExpertName(f"{match['layer']}{self.module}", int(match["expert"]), match["projection"])
        return None

    def name(self, module: str, expert: int, projection: str) -> str:
        """The Hub name of an expert's projection, from the fused module's name in memory."""
        return f"{module.removesuffix(self.module)}{self.on_disk or self.module}.{expert}.{projection}"

    def fused_in(self, name: str) -> tuple[str, ...]:
        """Hub names, but for the expert's number, of what a tensor of a file holds for every expert; () for others."""
        for stack, ending in self.fused.items():
            if name.endswith(f".{ending}.weight"):
                module = name.removesuffix(f"{ending}.weight") + (self.on_disk or self.module)
                return tuple(f"{module}.{{expert}}.{projection}.weight" for projection in self.stacks[stack])
        return ()

    def fused_of(self, name: str) -> str:
        """Name of the tensor of a file that a tensor is a slice of; its own if it is none."""
        found = self.parse(name.removesuffix(".weight")) if self.fused else None
        if found is None:
            return name
        return f"{found.module.removesuffix(self.module)}{self.fused[self.stack_of(found.projection)]}.weight"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names, numbered = "|".join(self.projections), re.escape(self.on_disk or self.module)
        return re.compile(rf"^(?P<layer>.+\.){numbered}\.(?P<expert>\d+)\.(?P<projection>{names})$")
