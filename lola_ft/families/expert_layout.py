"""The names of experts: fused parameters in memory, numbered or fused tensors in a file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class ExpertName:
    """The parts of a Hub module name of one expert's projection: fused module in memory, expert id, projection."""

    module: str
    expert: int
    projection: str


@dataclass(frozen=True)
class ExpertLayout:
    """The names of an MoE layer's experts in memory (fused) and on disk.

    Attributes:
        module: Ending of the fused module's name in memory, such as `moe.experts`.
        stacks: The fused parameters, in the order in which the module registers them, each with the projections on
            disk that it holds side by side: one, or gate and up.
        on_disk: Ending of the name under which the experts are numbered on disk.
        fused: For files that do not number experts, the ending of the module whose weight holds all experts, by fused
            parameter. Each expert's tensor is then a slice of it.
    """

    module: str
    stacks: Mapping[str, tuple[str, ...]]
    on_disk: str = ""
    fused: Mapping[str, str] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        """The names on disk of an expert's matrices, in order."""
        return tuple(name for names in self.stacks.values() for name in names)

    @property
    def targets(self) -> tuple[str, ...]:
        """The fused parameters' names for PEFT's `target_parameters`."""
        return tuple(f"{self.module.rpartition('.')[2]}.{stack}" for stack in self.stacks)

    def stack_of(self, projection: str) -> str:
        """Return the fused parameter that holds a projection."""
        return next(stack for stack, names in self.stacks.items() if projection in names)

    def part_of(self, projection: str) -> tuple[int, int]:
        """Return a projection's number in its stack and the number of parts: (0, 1) if single, (1, 2) for up."""
        names = self.stacks[self.stack_of(projection)]
        return names.index(projection), len(names)

    def parse(self, module: str) -> ExpertName | None:
        """Split the Hub name of an expert's projection into its parts; return None for any other module."""
        if match := self._pattern.match(module):
            return ExpertName(f"{match['layer']}{self.module}", int(match["expert"]), match["projection"])
        return None

    def name(self, module: str, expert: int, projection: str) -> str:
        """Return the Hub name of an expert's projection, from the fused module's name in memory."""
        return f"{module.removesuffix(self.module)}{self.on_disk or self.module}.{expert}.{projection}"

    def fused_in(self, name: str) -> tuple[str, ...]:
        """Return the Hub names (with `{expert}` for the id) of the slices of a file's tensor; () if it holds none."""
        for stack, ending in self.fused.items():
            if name.endswith(f".{ending}.weight"):
                module = name.removesuffix(f"{ending}.weight") + (self.on_disk or self.module)
                return tuple(f"{module}.{{expert}}.{projection}.weight" for projection in self.stacks[stack])
        return ()

    def fused_of(self, name: str) -> str:
        """Return the name of the file's tensor that holds this tensor as a slice; its own name if it is no slice."""
        found = self.parse(name.removesuffix(".weight")) if self.fused else None
        if found is None:
            return name
        return f"{found.module.removesuffix(self.module)}{self.fused[self.stack_of(found.projection)]}.weight"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names, numbered = "|".join(self.projections), re.escape(self.on_disk or self.module)
        return re.compile(rf"^(?P<layer>.+\.){numbered}\.(?P<expert>\d+)\.(?P<projection>{names})$")
