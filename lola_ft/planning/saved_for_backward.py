"""The activations: bytes of the tensors that autograd keeps for backward, counted part by part through the layers.

The idea: a part keeps its input if something trained is inside it, or before it in the network. An example is one MLP
of LOLA with T tokens, hidden size D, inner size F, LoRA of rank R on both layers, 2 bytes per number, no dropout:

    norm         x (T, D) and statistics      only if a gradient flows through it (`x_grad`)
    linear D→F   input (T, D), LoRA (T, R)    T·D·2 + T·R·2 bytes, plus cast copies of A and B
    activation   input (T, F)                 T·F·2 bytes
    linear F→D   input (T, F), LoRA (T, R)    T·F·2 + T·R·2 bytes

`Walk` goes through all layers this way. With gradient checkpointing only the inputs of layers, (T, D) each, are kept,
and the largest layer is added once, because it is recomputed in the backward pass.

Rules that differ by device: dropout keeps its noise in the input's dtype on a CPU, in one byte per number on a GPU.
Under autocast a GPU computes LayerNorms and powers in float32, a CPU does not. PEFT casts the input of LoRA to float32,
except under autocast on a GPU.

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
    """Bytes kept between forward and backward.

    Attributes:
        saved: Bytes that autograd keeps at the end of a forward pass, without the attention mask.
        recomputed: With gradient checkpointing, bytes that the largest layer saves when it is recomputed.
        held: Bytes of the attention mask and, with checkpointing, of the choices of experts.
    """

    saved: int
    recomputed: int = 0
    held: int = 0


def activations(job: Job) -> Activations:
    """Count the activations of a full micro batch with a label for every token."""
    sizes = job.sizes
    row = job.tokens * sizes.hidden  # numbers of the hidden states (T, D)
    # 1. Walk through embeddings and layers. Checkpointing makes every layer's input require a gradient.
    walk = Walk(job, x_grad=job.checkpointing)
    saved = walk.embeddings()
    layers = [walk.layer(layer) for layer in range(sizes.layers)]
    # 2. With checkpointing keep only the layers' inputs (T, D), else everything that the layers save.
    inputs = row * walk.stream_width
    saved += sizes.layers * inputs if job.checkpointing else sum(layers)
    # 3. The last norm, and the loss, which keeps the gradient of its input rows (T, D).
    saved += walk.norm() + job.tokens + row * walk.norm_width
    # 4. Checkpointing also keeps the chosen experts (T, K), so that the recomputation chooses the same.
    choices = _INDEX * job.tokens * sizes.top_k * len(sizes.moe_layers) if job.checkpointing else 0
    return Activations(saved, max(layers) - inputs if job.checkpointing else 0, mask_bytes(job) + choices)


class Walk:
    """Counts the saved bytes of the layers in order. `x_grad` is True as soon as the hidden states need a gradient."""

    def __init__(self, job: Job, x_grad: bool) -> None:
        architecture = job.architecture
        self.job, self.architecture, self.settings = job, architecture, job.settings
        self.family, self.sizes = architecture.family, job.sizes
        self.tokens, self.width, self.half, self.cuda = job.tokens, job.width, job.half, job.on_cuda
        self.ranks = job.settings.ranks()
        self.exact_width = (
            _FLOAT if self.half and self.cuda else self.width
        )  # bytes of numbers that autocast on a GPU computes in float32
        self.x_grad = x_grad

    @property
    def norm_width(self) -> int:
        """Bytes per number of a norm's output."""
        if self.family.norm == "rms":
            return _FLOAT if self.settings.tune_norms else self.width  # a trained weight is float32
        return self.exact_width

    @property
    def stream_width(self) -> int:
        """Bytes per number of the hidden states between two layers."""
        return self.norm_width if self.family.normed_embeddings else self.width

    def embeddings(self) -> int:
        saved = self.dropout(self.sizes.embedding_dropout, self.tokens * self.sizes.hidden)
        return saved + (self.norm() if self.family.normed_embeddings else 0)

    def layer(self, layer: int) -> int:
        saved = self.norm() + self._attention(layer) + self.norm()
        return saved + (self._moe(layer) if layer in self.sizes.moe_layers else self._mlp(layer, "mlp"))

    def norm(self, size: int | None = None) -> int:
        """Count a norm: its input (a float32 copy if computed in float32), statistics, cast or trained weights.

        Args:
            size: Numbers per token; None means the hidden size.
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
        """Count dropout's noise, which is kept only if a gradient flows through it."""
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
        """Count latent attention, where keys and values, and in some models queries, pass a narrow layer and a norm."""
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
        """Count an MLP: two linear layers with an activation between them, or three (gate and up side by side)."""
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
        """Count linear layers that read the same norm's output. The first keeps it for all, if no layer copies it."""
        saved, before = 0, self.x_grad
        for place, matrix in enumerate(matrices):
            after, self.x_grad = self.x_grad, before
            saved += self._linear(group, matrix, self.norm_width, place > 0 and self.norm_width == self.width)
            self.x_grad = self.x_grad or after
        return saved

    def _linear(self, group: str, matrix: tuple[int, int], x_width: int, kept: bool) -> int:
        """Count a linear layer's LoRA; its frozen weight keeps nothing.

        Args:
            matrix: Numbers of outputs and of inputs.
            x_width: Bytes per number of the input.
            kept: True if the input is already kept elsewhere.
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
        saved = self.dropout(probability, tokens * size_in, noise_width)  # noise (T, in)
        if probability or not kept or to_float:  # A's input (T, in), which dropout or a cast makes a new tensor
            saved += tokens * size_in * self.width
        saved += tokens * rank * self.width  # B's input (T, R)
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
        """Count the router: scores and probabilities (T, E), in float32."""
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
        """Count the experts: inputs and pre-activations; for LoRA its factors, rank-R intermediates and dropout masks.

        Args:
            chosen: Number of experts with LoRA.
        """
        settings, sizes, rows = self.settings, self.sizes, grouped_rows(self.job)
        hidden, inner, inputs = sizes.hidden, sizes.expert_inner, expert_inputs(self.job)
        kept_inputs = rows if sizes.top_k == 1 else self.tokens  # rows grouped by expert, or tokens in their order
        saved = (kept_inputs * hidden + rows * inputs * inner) * self.width
        if not self.cuda and inputs == 1:  # the activation's output; a GPU and gated experts compute it again
            saved += rows * inner * self.width
        if chosen:
            rank = settings.expert_rank or 0
            if chosen < sizes.num_experts:  # experts without LoRA get zeros
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
    """Return the rows of the experts' buffer: on a GPU the most that can be needed, on a CPU an average padding."""
    sizes, chosen = job.sizes, job.tokens * job.sizes.top_k
    experts = min(sizes.num_experts, chosen)
    if job.on_cuda:
        tile = fitting_tile_rows(chosen, sizes.num_experts)
        return (chosen // tile + experts) * tile
    rows = chosen + experts * bucket_of(chosen // experts) // 2
    return rows + (BUFFER_BUCKET // 2 if rows > BUFFER_BUCKET else 0)


def expert_inputs(job: Job) -> int:
    """Return the number of an expert's projections that read the hidden states: 1, or 2 for gate and up."""
    layout = job.architecture.family.experts
    return len(layout.projections) - 1 if layout else 0


def expert_factors(job: Job, rank: int) -> int:
    """Return the LoRA values per expert, of its input projections (gate and up share one A) and its output."""
    sizes = job.sizes
    return rank * (2 * sizes.hidden + (1 + expert_inputs(job)) * sizes.expert_inner)


@cache
def kept_by_activation(name: str) -> int:
    """Return how many numbers an activation keeps per input number, without its result, by running it once.

    A model's own function that transformers does not list is assumed to keep its input.
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
