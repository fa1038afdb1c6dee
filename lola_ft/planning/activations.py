"""What autograd keeps for backward, part by part as the model's own code saves it.

Dropout keeps its noise in the input's dtype on a CPU and a byte a number on a GPU. Under autocast a GPU computes norms
in float32, a CPU does not; PEFT casts what enters LoRA to float32 unless autocast is on for a GPU.

Letters: T tokens, D hidden, F inner, E experts, H heads, R rank.
"""

from dataclasses import dataclass

from lola_ft.kernels.attention import LONGEST
from lola_ft.kernels.experts import RANK_MULTIPLE
from lola_ft.kernels.grouping import BUFFER_BUCKET, bucket_of, fitting_tile_rows
from lola_ft.model.packed import TOKENS
from lola_ft.planning.job import Job

_FLOAT = 4
_INDEX = 8


@dataclass(frozen=True)
class Activations:
    """Bytes between forward and backward.

    Attributes:
        saved: What autograd holds at the end of a forward pass.
        recomputed: With gradient checkpointing, what the largest layer saves when it is run again.
        held: Masks and choices of experts that are kept beside it.
    """

    saved: int
    recomputed: int = 0
    held: int = 0


def activations(job: Job) -> Activations:
    """Of a full micro batch with a label for every token."""
    config, tokens = job.config, job.tokens
    row = tokens * config.n_embd
    walk = Walk(job, x_grad=job.checkpointing)
    saved = walk.dropout(config.embd_pdrop, row)
    layers = []
    for layer_idx in range(config.n_layer):
        layers.append(walk.layer(layer_idx))
    inputs = row * job.width
    saved += config.n_layer * inputs if job.checkpointing else sum(layers)
    saved += walk.norm() + tokens + tokens * config.n_embd * walk.norm_width  # d_rows of the loss
    mask = walk.mask_numbers
    held = mask + _INDEX * tokens * (job.checkpointing * sum(map(config.is_moe_layer, range(config.n_layer))))
    return Activations(saved, max(layers) - inputs if job.checkpointing else 0, held)


class Walk:
    """Goes through the layers in order, and knows from where on there is something to propagate back."""

    def __init__(self, job: Job, x_grad: bool) -> None:
        config = job.config
        self.job, self.config, self.settings = job, config, job.settings
        self.tokens, self.width = job.tokens, job.width
        self.half, self.cuda = job.width == 2, job.on_cuda
        self.norm_width = _FLOAT if self.half and self.cuda else job.width
        self.x_grad = x_grad or job.settings.tune_norms or job.settings.tune_biases

    @property
    def mask_numbers(self) -> int:
        """Of the attention mask: packed rows and rows of unequal length need one."""
        length, batch = attended(self.job)
        return round(batch * length**2) if self.job.packing or batch > 1 else 0

    def layer(self, layer_idx: int) -> int:
        saved = self.norm() + self._attention() + self.norm()
        return saved + (self._moe(layer_idx) if self.config.is_moe_layer(layer_idx) else self._mlp())

    def norm(self) -> int:
        """The input (a float32 copy where norms are computed in that), mean and deviation, cast weights."""
        if not self.x_grad:
            return 0
        copies = 2 * _FLOAT * self.config.n_embd if self.half and self.cuda and not self.settings.tune_norms else 0
        return self.tokens * (self.config.n_embd + 2) * self.norm_width + copies

    def dropout(self, probability: float, numbers: int, width: int | None = None) -> int:
        """The noise, if there is a gradient to multiply with it."""
        if not probability or not self.x_grad:
            return 0
        return numbers * (1 if self.cuda else width or self.width)

    def _attention(self) -> int:
        config, rank = self.config, self.settings.attention_rank
        row = self.tokens * config.n_embd
        saved = self._linear("attention", config.n_embd, 3 * config.n_embd, rank, self.norm_width, False)
        kept_output = False
        if self.x_grad:
            length, batch = attended(self.job)
            scores = round(batch * config.n_head * length**2)
            saved += 3 * row * self.width
            if config.attn_pdrop and not self.cuda:
                saved += 2 * row * self.width + 3 * scores * self.width
            else:
                kept_output = True
                saved += row * self.width + self.tokens * config.n_head * _FLOAT
                if self.cuda or not self.half or length > LONGEST:  # else all layers keep the same mask as it is
                    saved += self.mask_numbers * self.width
        saved += self._linear("attention", config.n_embd, config.n_embd, rank, self.width, kept_output)
        return saved + self.dropout(config.resid_pdrop, row)

    def _mlp(self) -> int:
        config, rank = self.config, self.settings.mlp_rank
        saved = self._linear("mlp", config.n_embd, config.n_inner, rank, self.norm_width, False)
        if self.x_grad:
            saved += self.tokens * config.n_inner * self.width  # GELU's input
        saved += self._linear("mlp", config.n_inner, config.n_embd, rank, self.width, False)
        return saved + self.dropout(config.resid_pdrop, self.tokens * config.n_embd)

    def _linear(self, group: str, size_in: int, size_out: int, rank: int | None, x_width: int, kept: bool) -> int:
        """A linear layer's LoRA; its frozen weight needs nothing.

        Args:
            x_width: Bytes of a number that comes in.
            kept: Whether the input is kept already.
        """
        if rank is None:
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

    def _moe(self, layer_idx: int) -> int:
        tokens, row = self.tokens, self.tokens * self.config.n_embd
        before = self.x_grad
        saved = self._router()
        probs_grad, self.x_grad = self.x_grad, before
        chosen = self._chosen(layer_idx)
        if not (probs_grad or chosen):
            return saved
        saved += self._experts(chosen)
        if not probs_grad and self.half:
            saved += tokens * self.width
        self.x_grad = True
        return saved + self.dropout(self.config.resid_pdrop, row)

    def _router(self) -> int:
        """Scores and probabilities, in float32."""
        settings, config, tokens = self.settings, self.config, self.tokens
        rank = settings.router_rank
        trained = settings.tune_router or rank is not None
        saved = 0
        if trained:
            saved += tokens * config.n_embd * _FLOAT
        if rank is not None:
            probability = settings.dropout_of("router")
            saved += tokens * rank * _FLOAT
            saved += self.dropout(probability, tokens * config.n_embd, _FLOAT)
        if self.half and self.x_grad and not settings.tune_router:
            saved += config.num_experts * config.n_embd * _FLOAT
        self.x_grad = self.x_grad or trained
        if self.x_grad:
            scores = tokens * config.num_experts * _FLOAT
            saved += scores * (1 + 2 * self.job.router_losses) + tokens * (_INDEX + self.width)
        return saved

    def _experts(self, chosen: int) -> int:
        """Grouped inputs, pre-activations, outputs; of LoRA its factors, what is between them, the dropout masks.

        Args:
            chosen: How many experts have LoRA.
        """
        settings, config = self.settings, self.config
        hidden, inner, rows = config.n_embd, config.n_inner, grouped_rows(self.job)
        saved = (rows * (hidden + inner) + self.tokens * hidden) * self.width
        if not self.cuda:
            saved += rows * inner * self.width  # GELU's output; a GPU computes it again
        if chosen:
            rank = settings.expert_rank or 0
            if chosen < config.num_experts:  # zeros for those without LoRA
                saved += chosen * (2 * rank * (hidden + inner) * _FLOAT + 2 * _INDEX)
            rank = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
            saved += (2 * rows * rank + config.num_experts * 2 * rank * (hidden + inner)) * self.width
            if settings.dropout_of("experts"):
                saved += rows * (hidden + inner)
        return saved

    def _chosen(self, layer_idx: int) -> int:
        settings = self.settings
        if settings.expert_rank is None:
            return 0
        if settings.selection is None:
            return self.config.num_experts
        return len(settings.selection[layer_idx // 2])


def attended(job: Job) -> tuple[int, float]:
    """Tokens of what attends to itself at most, and how often there is such: rows, or stretches of packed documents."""
    if not job.packing:
        return job.length, job.sequences
    length = min(job.tokens, TOKENS.get(job.device, job.tokens))
    return length, job.tokens / length


def grouped_rows(job: Job) -> int:
    """Rows of the experts' buffer: on a GPU the most that could be needed, on a CPU half a bucket more for each."""
    experts = min(job.config.num_experts, job.tokens)
    if job.on_cuda:
        tile = fitting_tile_rows(job.tokens, job.config.num_experts)
        return (job.tokens // tile + experts) * tile
    rows = job.tokens + experts * bucket_of(job.tokens // experts) // 2
    return rows + (BUFFER_BUCKET // 2 if rows > BUFFER_BUCKET else 0)
