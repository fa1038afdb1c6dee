"""A dense model's sizes under the names that LOLA's config has for them, and the tensors that it will hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lola_ft.baseline.families import FAMILIES, Family


@dataclass(frozen=True)
class DenseConfig:
    """What a plan reads of a dense model.

    Attributes:
        shapes: Of every parameter and buffer by its name in the model, in the model's order; tied ones once.
        activation: transformers' name of what stands between the two linear layers of an MLP.
    """

    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    n_layer: int
    n_embd: int
    n_inner: int
    n_head: int
    vocab_size: int
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float
    activation: str

    @staticmethod
    def of(config: Any) -> "DenseConfig":
        """From transformers' config of a known family."""
        family, hidden = FAMILIES[config.model_type], config.hidden_size
        common = (family, _shapes(config), config.num_hidden_layers, hidden)
        heads, words = config.num_attention_heads, config.vocab_size
        if family.name == "gpt2":
            dropouts = (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop)
            return DenseConfig(
                *common, config.n_inner or 4 * hidden, heads, words, *dropouts, config.activation_function
            )
        dropouts = (0.0, config.attention_dropout, config.hidden_dropout)
        return DenseConfig(*common, 4 * hidden, heads, words, *dropouts, "bloom")

    def group_of(self, name: str) -> str | None:
        """Whether a tensor is the weight of one of attention's or MLP's linear layers."""
        module, _, kind = name.rpartition(".")
        groups = self.family.groups.items()
        return next((group for group, ends in groups if kind == "weight" and module.endswith(ends)), None)

    def out_by_in(self, name: str) -> tuple[int, int]:
        """Numbers that a linear layer gives, and those it takes."""
        rows, columns = self.shapes[name]
        return (columns, rows) if self.family.in_by_out else (rows, columns)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The model is made without memory and asked."""
    # Here: transformers' models take seconds to import, and plans of LOLA do without.
    from lola_ft.baseline.models import CLASSES

    with torch.device("meta"):
        model = CLASSES[config.model_type](config)
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
