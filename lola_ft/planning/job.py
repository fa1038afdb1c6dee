"""The run that a prediction is made for."""

from dataclasses import dataclass, replace

from lola_ft.adapters.settings import AdapterSettings
from lola_ft.families import Architecture, Sizes


@dataclass(frozen=True)
class Job:
    """A run, reduced to the facts that its memory depends on.

    Attributes:
        architecture: The base's architecture.
        dtype: Dtype of computation and of unquantised weights: bfloat16, float16 or float32.
        device: `cuda` or `cpu`, which save different tensors for backward.
        length: Longest row of a batch in tokens.
        row_sequences: Sequences computed per row of the data: 2 for a pair of DPO, else 1.
        least_micro_batch: Fewest rows that a micro batch may have.
        packing: Rows hold several sequences. A batch is then one long row whose sequences are kept apart.
        optimizer: The optimiser's name in a recipe.
        router_losses: Number of router losses.
        continues: The run continues an adapter, whose ranks are fixed.
        offload: The experts' 4-bit weights are in host memory.
        base_dropout: The base's own dropouts are on; dpo and kto train without them.
        reference: A frozen copy of the adapter is in memory, as the reference of dpo and kto.
    """

    architecture: Architecture
    settings: AdapterSettings
    quantization: str | None = "nf4"
    dtype: str = "bfloat16"
    device: str = "cuda"
    micro_batch_size: int = 4
    grad_accum_steps: int = 4
    length: int = 1024
    packing: bool = True
    checkpointing: bool = True
    optimizer: str = "adamw_8bit"
    router_losses: int = 0
    row_sequences: int = 1
    least_micro_batch: int = 1
    continues: bool = False
    reference: bool = False
    base_dropout: bool = True
    offload: bool = False

    @property
    def sizes(self) -> Sizes:
        """The base's sizes, with the dropouts that are on."""
        sizes = self.architecture.sizes
        if self.base_dropout:
            return sizes
        return replace(sizes, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0)

    @property
    def sequences(self) -> int:
        """The number of sequences of a micro batch whose rows are not packed."""
        return self.micro_batch_size * self.row_sequences

    @property
    def tokens(self) -> int:
        """The most tokens of a micro batch."""
        return self.sequences * self.length

    @property
    def width(self) -> int:
        """Bytes per computed number; 2 means autocast."""
        return 4 if self.dtype == "float32" else 2

    @property
    def half(self) -> bool:
        """True if computed numbers have 16 bits."""
        return self.width == 2

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"
