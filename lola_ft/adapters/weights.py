"""An adapter's numbers under the Hub's names, whatever layout they are stored in.

Every module that has LoRA on disk's terms, each expert's projection included, has one pair of matrices here; merging,
converting and loading all start from this form.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lola_ft.errors import AdapterError


@dataclass(frozen=True)
class LoraPair:
    """The update of one 2-D weight: `scaling * b @ a`, out×in (the Hub stores in×out).

    Attributes:
        a: (R, in).
        b: (out, R).
        alpha: The update's strength before it is divided by R (or its root, for rsLoRA).
    """

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass
class AdapterWeights:
    """A whole adapter.

    Attributes:
        pairs: By Hub module name, such as `transformer.h.1.moe.experts.3.c_fc`.
        trained: Weights trained as they are (the router's), by Hub tensor name.
        rslora: Scale by alpha / sqrt(rank) in place of alpha / rank.
        base: The base's Hub id, or "".
        base_fingerprint: Identity of the base's weights, if it is known.
        keys: Names in the file that it was read from, by module (A's and B's) or trained weight.
    """

    pairs: dict[str, LoraPair]
    trained: dict[str, Tensor] = field(default_factory=dict)
    rslora: bool = False
    base: str = ""
    base_fingerprint: str | None = None
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def scaling(self, module: str) -> float:
        pair = self.pairs[module]
        return pair.alpha / (pair.rank**0.5 if self.rslora else pair.rank)

    def delta(self, module: str) -> Tensor:
        """The update of `module`'s Hub weight, in×out, float32 (LoRA, arXiv 2106.09685)."""
        pair = self.pairs[module]
        return torch.mm(pair.a.float().t(), pair.b.float().t()).mul_(self.scaling(module))

    def tensor_count(self) -> int:
        """How many stored tensors this is in the per-expert layout."""
        return 2 * len(self.pairs) + len(self.trained)

    def check_against(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse an adapter that does not fit a checkpoint's tensors (Hub names and shapes, in×out).

        Raises:
            AdapterError: Naming every module that does not fit.
        """
        problems = []
        for module, pair in self.pairs.items():
            shape = shapes.get(f"{module}.weight")
            update = (pair.a.shape[1], pair.b.shape[0])
            if shape is None:
                problems.append(f"{module}: the base has no such module")
            elif tuple(shape) != update:
                problems.append(f"{module}: the adapter changes a {list(update)} weight, the base's is {list(shape)}")
        for name, tensor in self.trained.items():
            if name not in shapes:
                problems.append(f"{name}: the base has no such tensor")
            elif tuple(shapes[name]) != tuple(tensor.shape):
                problems.append(f"{name}: {list(tensor.shape)} in the adapter, {list(shapes[name])} in the base")
        if problems:
            shown = "\n  ".join(problems[:5]) + (f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise AdapterError(f"The adapter does not fit this base:\n  {shown}")
