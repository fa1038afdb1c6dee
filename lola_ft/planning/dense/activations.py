"""What autograd keeps of a dense model for backward, part by part as transformers' code saves it.

Letters: T tokens, D hidden, F inner, H heads.
"""

from abc import ABC, abstractmethod

import torch
from transformers.activations import ACT2FN

from lola_ft.planning.activations import Activations, Walk
from lola_ft.planning.job import Job

_FLOAT = 4


def dense_activations(job: Job) -> Activations:
    """Of a full micro batch with a label for every token."""
    config, row = job.config, job.tokens * job.config.n_embd
    walk = WALKS[config.family.name](job, x_grad=job.checkpointing)
    saved = walk.embeddings()
    layers = [walk.layer() for _ in range(config.n_layer)]
    inputs, mask = row * walk.stream_width, walk.mask_bytes()
    saved += config.n_layer * inputs if job.checkpointing else sum(layers)
    saved += walk.norm() + job.tokens + row * walk.norm_width  # d_rows of the loss
    if job.checkpointing and walk.checkpoints_save_mask:
        saved, mask = saved + mask, 0
    return Activations(saved, max(layers) - inputs if job.checkpointing else 0, mask)


class DenseWalk(Walk, ABC):
    """Goes through the layers in order; each has attention and MLP, and each of these a norm before it.

    Attributes:
        checkpoints_save_mask: Whether a checkpoint's inputs, which are saved, include the attention mask.
    """

    checkpoints_save_mask: bool

    @property
    @abstractmethod
    def stream_width(self) -> int:
        """Bytes of a number between two layers."""

    @abstractmethod
    def embeddings(self) -> int:
        """What comes before the first layer."""

    @abstractmethod
    def mask_bytes(self) -> int:
        """The mask that all layers share."""

    @abstractmethod
    def attention_inside(self) -> tuple[int, bool]:
        """Between attention's two linear layers, and whether the second one's input is among it."""

    @abstractmethod
    def activation(self) -> int:
        """Between MLP's two linear layers, without the second one's input."""

    def layer(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all are alike
        config, settings = self.config, self.settings
        hidden, inner, row = config.n_embd, config.n_inner, self.tokens * config.n_embd
        saved = self.norm()
        saved += self._linear("attention", hidden, 3 * hidden, settings.attention_rank, self.norm_width, False)
        inside, kept = self.attention_inside() if self.x_grad else (0, False)
        saved += inside + self._linear("attention", hidden, hidden, settings.attention_rank, self.width, kept)
        saved += self.dropout(config.resid_pdrop, row) + self.norm()
        saved += self._linear("mlp", hidden, inner, settings.mlp_rank, self.norm_width, False)
        saved += self.activation() if self.x_grad else 0
        saved += self._linear("mlp", inner, hidden, settings.mlp_rank, self.width, False)
        return saved + self.dropout(config.resid_pdrop, row)


class Gpt2Walk(DenseWalk):
    """Fused attention with a mask of truth values; an activation that may be of several steps."""

    checkpoints_save_mask = True

    @property
    def stream_width(self) -> int:
        return self.width

    @property
    def mask_numbers(self) -> int:
        """Packed rows and rows of unequal length need a mask."""
        length, batch = whole_rows(self.job)
        return batch * length**2 if self.job.packing or batch > 1 else 0

    def embeddings(self) -> int:
        return self.dropout(self.config.embd_pdrop, self.tokens * self.config.n_embd)

    def mask_bytes(self) -> int:
        return self.mask_numbers

    def attention_inside(self) -> tuple[int, bool]:
        config = self.config
        row = self.tokens * config.n_embd
        if config.attn_pdrop and not self.cuda:  # step by step, in float32; of a single float32 row less is copied
            length, batch = whole_rows(self.job)
            rows = 5 if batch == 1 and not self.half else 3
            return (rows * row + 3 * batch * config.n_head * length**2) * _FLOAT, False
        fused = self.tokens * config.n_head * _FLOAT + self.mask_numbers * self.width
        return 4 * row * self.width + fused, True

    def activation(self) -> int:
        """Of several steps: with a power among them, which a GPU's autocast computes in float32."""
        kept = kept_by_activation(self.config.activation)
        return self.tokens * self.config.n_inner * kept * (self.norm_width if kept > 1 else self.width)


class BloomWalk(DenseWalk):
    """Attention whose scores exist, with a mask of numbers; the stream has the dtype of the embeddings' norm."""

    checkpoints_save_mask = False

    @property
    def stream_width(self) -> int:
        return self.norm_width

    def embeddings(self) -> int:
        return self.norm()

    def mask_bytes(self) -> int:
        return self.job.sequences * self.job.length**2 * self.width

    def attention_inside(self) -> tuple[int, bool]:
        config, job = self.config, self.job
        scores = job.sequences * config.n_head * job.length**2
        saved = 3 * self.tokens * config.n_embd * self.width + scores * _FLOAT  # softmax is float32
        if config.attn_pdrop or self.half:  # what is multiplied with the values is another tensor
            saved += scores * self.width
        return saved + self.dropout(config.attn_pdrop, scores), False

    def activation(self) -> int:
        return self.tokens * self.config.n_inner * self.width


def whole_rows(job: Job) -> tuple[int, int]:
    """Tokens of what GPT-2 attends over, and how often there is such: rows, or all packed rows in one."""
    return (job.tokens, 1) if job.packing else (job.length, job.sequences)


def kept_by_activation(name: str) -> int:
    """How many numbers an activation keeps for each that comes in, its result left out: it is asked with a few."""
    x = torch.ones(8, requires_grad=True)
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = ACT2FN[name](x)
    seen.pop(result.untyped_storage().data_ptr(), None)
    return sum(tensor.numel() for tensor in seen.values()) // x.numel()


WALKS: dict[str, type[DenseWalk]] = {"gpt2": Gpt2Walk, "bloom": BloomWalk}
