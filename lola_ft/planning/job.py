"""The run that a prediction is made for."""

from dataclasses import dataclass, replace

from lola_ft.adapters.settings import AdapterSettings
from lola_ft.families import Architecture, Sizes


@dataclass(frozen=True)
class Job:
    """A run, as far as its memory goes.

    Attributes:
        architecture: The base's.
        dtype: What is computed in, and what stays dense is held in: bfloat16, float16 or float32.
        device: `cuda` or `cpu`; they save different things for backward.
        length: Longest row of a batch in tokens.
        row_sequences: Sequences that a row of the data is computed as: two of a pair for DPO.
        least_micro_batch: Fewest rows that a micro batch may have.
        packing: Rows hold several sequences; a batch is then one long row in which they are kept apart.
        optimizer: A recipe's name for it.
        router_losses: How many losses of the routers there are.
        continues: Whether the adapter exists already, so that its ranks stay.
        offload: Whether the experts' 4-bit weights are in host memory.
        base_dropout: Whether the base's own dropouts are at work; preferences are learned without them.
        reference: Whether a frozen copy of the adapter lies beside it, as the reference of preferences.
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
        """The base's, with the dropouts that are at work."""
        sizes = self.architecture.sizes
        if self.base_dropout:
            return sizes
        return replace(sizes, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0)

    @property
    def sequences(self) -> int:
        """Of a micro batch, if its rows are not packed."""
        return self.micro_batch_size * self.row_sequences

    @property
    def tokens(self) -> int:
        """Of a micro batch, at most."""
        return self.sequences * self.length

    @property
    def width(self) -> int:
        """Bytes of a computed number; 2 means autocast."""
        return 4 if self.dtype == "float32" else 2

    @property
    def half(self) -> bool:
        """Whether numbers have 16 bits."""
        return self.width == 2

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"
