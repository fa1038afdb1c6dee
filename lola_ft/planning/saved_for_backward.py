"""The tensors that autograd keeps for backward, part by part as the model's own code saves them.

Dropout keeps its noise in the input's dtype on a CPU and in one byte per number on a GPU. Under autocast a GPU computes
LayerNorms and powers in float32, a CPU does not. PEFT casts the input of LoRA to float32, unless autocast is on for a
GPU.

Letters: T tokens, K experts per token, D hidden, F inner, E experts, R rank.
"""

from dataclasses import dataclass
from functools import cache

import torch
from transformers.activations import ACT2FN

from lola_ft.kernels.experts import RANK_MULTIPLE
from lola_ft.kernels.grouping import BUFFER_BUCKET, bucket_of, fitting_tile_rows
from lola_ft.planning.attention_memory import kept_inside, kept_inside_latent, mask_bytes
from lola_ft.planning.job import Job

_FLOAT = 4
_INDEX = 8


@dataclass(frozen=True)
class Activations:
    """Bytes between forward and backward.

    Attributes:
        saved: What autograd holds at the end of a forward pass, without the attention mask.
        recomputed: With gradient checkpointing, what the largest layer saves when it is run again.
        held: Attention mask and choices of experts, which are kept beside it.
    """

    saved: int
    recomputed: int = 0
    held: int = 0


def activations(job: Job) -> Activations:
    """Count a full micro batch with a label for every token."""
    sizes = job.sizes
    row = job.tokens * sizes.hidden
    walk = Walk(job, x_grad=job.checkpointing)
    saved = walk.embeddings()
    layers = [walk.layer(layer) for layer in range(sizes.layers)]
    inputs = row * walk.stream_width
    saved += sizes.layers * inputs if job.checkpointing else sum(layers)
    saved += walk.norm() + job.tokens + row * walk.norm_width  # d_rows of the loss
    choices = _INDEX * job.tokens * sizes.top_k * len(sizes.moe_layers) if job.checkpointing else 0
    return Activations(saved, max(layers) - inputs if job.checkpointing else 0, mask_bytes(job) + choices)


class Walk:
    """Goes through the layers in order, and knows from where on there is something to propagate back."""

    def __init__(self, job: Job, x_grad: bool) -> None:
        architecture = job.architecture
        self.job, self.architecture, self.settings = job, architecture, job.settings
        self.family, self.sizes = architecture.family, job.sizes
        self.tokens, self.width, self.half, self.cuda = job.tokens, job.width, job.half, job.on_cuda
        self.ranks = job.settings.ranks()
        self.exact_width = _FLOAT if self.half and self.cuda else self.width  # of what a GPU's autocast computes so
        self.x_grad = x_grad

    @property
    def norm_width(self) -> int:
        """Bytes per number that a norm gives."""
        if self.family.norm == "rms":
            return _FLOAT if self.settings.tune_norms else self.width  # a trained weight is float32
        return self.exact_width

    @property
    def stream_width(self) -> int:
        """Bytes per number between two layers: what comes out of the embeddings."""
        return self.norm_width if self.family.normed_embeddings else self.width

    def embeddings(self) -> int:
        saved = self.dropout(self.sizes.embedding_dropout, self.tokens * self.sizes.hidden)
        return saved + (self.norm() if self.family.normed_embeddings else 0)

    def layer(self, layer: int) -> int:
        saved = self.norm() + self._attention(layer) + self.norm()
        return saved + (self._moe(layer) if layer in self.sizes.moe_layers else self._mlp(layer, "mlp"))

    def norm(self, size: int | None = None) -> int:
        """The input (a float32 copy where norms are computed in that), statistics, cast or trained weights.

        Args:
            size: Numbers per token; the hidden size if left out.
        """
        row, tuned, before = self.tokens * (size or self.sizes.hidden), self.settings.tune_norms, self.x_grad
        if self.family.norm == "rms":
            self.x_grad = before or tuned
            return ((row + self.tokens) * _FLOAT if before else 0) + (row * self.width if tuned else 0)
        self.x_grad = before or tuned or self.settings.tune_biases
        if not self.x_grad:
            return 0
        copies = 2 * _FLOAT * self.sizes.hidden if self.half and self.cuda and not tuned else 0
        return row * self.norm_width + 2 * self.tokens * (_FLOAT if tuned else self.norm_width) + copies

    def dropout(self, probability: float, numbers: int, width: int | None = None) -> int:
        """The noise, if there is a gradient to multiply with it."""
        if not probability or not self.x_grad:
            return 0
        return numbers * (1 if self.cuda else width or self.width)

    def _attention(self, layer: int) -> int:
        if self.family.attention == "latent":
            return self._latent_attention(layer)
        *inputs, output = self.architecture.matrices[layer, "attention"]
        saved = self._side_by_side("attention", inputs)
        if self.family.normed_queries:
            saved += self.norm(inputs[0][0]) + self.norm(inputs[1][0])
        kept_output = False
        if self.x_grad:
            inside, kept_output = kept_inside(self.job, output[1])
            saved += inside
        saved += self._linear("attention", output, self.width, kept_output)
        return saved + self.dropout(self.sizes.residual_dropout, self.tokens * self.sizes.hidden)

    def _latent_attention(self, layer: int) -> int:
        """Keys and values, and perhaps queries, pass a narrow layer and a norm."""
        *queries, narrow, wide, output = self.architecture.matrices[layer, "attention"]
        saved = self._side_by_side("attention", [queries[0], narrow])
        for second in [*queries[1:], wide]:
            saved += self.norm(second[1]) + self._linear("attention", second, self.norm_width, False)
        kept_output = False
        if self.x_grad:
            inside, kept_output = kept_inside_latent(self.job, queries[-1][0], output[1], wide[0])
            saved += inside
        return saved + self._linear("attention", output, self.width, kept_output)

    def _mlp(self, layer: int, group: str) -> int:
        """Two linear layers with an activation between them, or three: gate and up side by side."""
        *inputs, output = self.architecture.matrices[layer, group]
        saved = self._side_by_side(group, inputs)
        if self.x_grad:
            numbers, kept = self.tokens * output[1], kept_by_activation(self.sizes.activation)
            saved += numbers * kept * (self.exact_width if kept > 1 else self.width)
            if len(inputs) > 1:  # the product of gate and up keeps both factors
                saved += 2 * numbers * self.width
        saved += self._linear(group, output, self.width, False)
        return saved + self.dropout(self.sizes.residual_dropout, self.tokens * self.sizes.hidden)

    def _side_by_side(self, group: str, matrices: list[tuple[int, int]]) -> int:
        """Linear layers with LoRA that read the same norm: the first keeps its input for all if none copies it."""
        saved, before = 0, self.x_grad
        for place, matrix in enumerate(matrices):
            after, self.x_grad = self.x_grad, before
            saved += self._linear(group, matrix, self.norm_width, place > 0 and self.norm_width == self.width)
            self.x_grad = self.x_grad or after
        return saved

    def _linear(self, group: str, matrix: tuple[int, int], x_width: int, kept: bool) -> int:
        """A linear layer's LoRA; its frozen weight needs nothing.

        Args:
            matrix: Outputs and inputs.
            x_width: Bytes per number that comes in.
            kept: Whether the input is kept already.
        """
        rank, (size_out, size_in) = self.ranks.get(group), matrix
        if rank is None:
            self.x_grad = self.x_grad or self.settings.tune_biases
            return 0
        settings, tokens = self.settings, self.tokens
        probability = settings.dropout_of(group)
        one_pass = self.job.quantization is not None and not settings.dora  # LoRA inside the 4-bit layer's own pass
        to_float = self.half and not one_pass and (not self.cuda or self.job.quantization is None)
        noise_width = self.width if one_pass else _FLOAT if to_float else x_width
        saved = self.dropout(probability, tokens * size_in, noise_width)
        if probability or not kept or to_float:
            saved += tokens * size_in * self.width
        saved += tokens * rank * self.width
        if one_pass:  # B is scaled, and both are cast
            saved += rank * self.width * (size_out + size_in * self.half)
        elif self.half:  # A and B are cast
            saved += rank * self.width * (size_out + size_in * self.x_grad)
        if settings.dora:
            saved += 2 * tokens * size_out * self.width + 3 * size_out * _FLOAT
        self.x_grad = True
        return saved

    def _moe(self, layer: int) -> int:
        tokens, row = self.tokens, self.tokens * self.sizes.hidden
        before = self.x_grad
        saved = self._router()
        probs_grad, self.x_grad = self.x_grad, before
        if (layer, "shared_experts") in self.architecture.matrices:
            saved += self._mlp(layer, "shared_experts")
        chosen = self._chosen(layer)
        if not (probs_grad or chosen):
            return saved
        saved += self._experts(chosen)
        if not probs_grad and self.half:
            saved += tokens * self.sizes.top_k * self.width
        self.x_grad = True
        return saved + self.dropout(self.sizes.residual_dropout, row)

    def _router(self) -> int:
        """Scores and probabilities, in float32."""
        settings, sizes, tokens = self.settings, self.sizes, self.tokens
        rank = settings.router_rank
        trained = settings.tune_router or rank is not None
        saved = 0
        if trained:
            saved += tokens * sizes.hidden * _FLOAT
        if rank is not None:
            probability = settings.dropout_of("router")
            saved += tokens * rank * _FLOAT
            saved += self.dropout(probability, tokens * sizes.hidden, _FLOAT)
        if self.half and self.x_grad and not settings.tune_router:
            saved += sizes.num_experts * sizes.hidden * _FLOAT
        self.x_grad = self.x_grad or trained
        if self.x_grad:
            scores = tokens * sizes.num_experts * _FLOAT
            saved += scores * (1 + 2 * self.job.router_losses) + tokens * sizes.top_k * (_INDEX + self.width)
        return saved

    def _experts(self, chosen: int) -> int:
        """Inputs and pre-activations; of LoRA its factors, its rank-R intermediates and dropout masks.

        Args:
            chosen: How many experts have LoRA.
        """
        settings, sizes, rows = self.settings, self.sizes, grouped_rows(self.job)
        hidden, inner, inputs = sizes.hidden, sizes.expert_inner, expert_inputs(self.job)
        kept_inputs = rows if sizes.top_k == 1 else self.tokens  # grouped, or as they came
        saved = (kept_inputs * hidden + rows * inputs * inner) * self.width
        if not self.cuda and inputs == 1:  # a GPU, and every machine for gated experts, computes it again
            saved += rows * inner * self.width
        if chosen:
            rank = settings.expert_rank or 0
            if chosen < sizes.num_experts:  # zeros for those without LoRA
                saved += chosen * (expert_factors(self.job, rank) * _FLOAT + 2 * _INDEX)
            rank = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
            saved += (2 * rows * rank + sizes.num_experts * expert_factors(self.job, rank)) * self.width
            if settings.dropout_of("experts"):
                saved += rows * (hidden + inner)
        return saved

    def _chosen(self, layer: int) -> int:
        settings = self.settings
        if settings.expert_rank is None:
            return 0
        if settings.selection is None:
            return self.sizes.num_experts
        return len(settings.selection[self.sizes.moe_layers.index(layer)])


def grouped_rows(job: Job) -> int:
    """Rows of the experts' buffer: on a GPU the most that could be needed, on a CPU half a bucket more for each."""
    sizes, chosen = job.sizes, job.tokens * job.sizes.top_k
    experts = min(sizes.num_experts, chosen)
    if job.on_cuda:
        tile = fitting_tile_rows(chosen, sizes.num_experts)
        return (chosen // tile + experts) * tile
    rows = chosen + experts * bucket_of(chosen // experts) // 2
    return rows + (BUFFER_BUCKET // 2 if rows > BUFFER_BUCKET else 0)


def expert_inputs(job: Job) -> int:
    """How many projections of an expert read the hidden states: one, or gate and up."""
    layout = job.architecture.family.experts
    return len(layout.projections) - 1 if layout else 0


def expert_factors(job: Job, rank: int) -> int:
    """Numbers of one expert's LoRA: of what leads inside (gate and up share one A), and of what leads out."""
    sizes = job.sizes
    return rank * (2 * sizes.hidden + (1 + expert_inputs(job)) * sizes.expert_inner)


@cache
def kept_by_activation(name: str) -> int:
    """How many numbers an activation keeps for each that comes in, its result left out: it is asked with a few.

    A function of a model's own, which transformers does not list, keeps its input.
    """
    if name not in ACT2FN:
        return 1
    x = torch.ones(8, requires_grad=True)
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = ACT2FN[name](x)
    seen.pop(result.untyped_storage().data_ptr(), None)
    return sum(tensor.numel() for tensor in seen.values()) // x.numel()
