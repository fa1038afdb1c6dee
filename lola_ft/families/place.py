"""One tensor of a checkpoint: its shape and group on disk, and its place in the model in memory."""

from dataclasses import dataclass

LORA_GROUPS = ("attention", "mlp", "shared_experts", "experts", "router")
"""Groups of weights that can have LoRA, if the family has them."""
QUANTIZED_GROUPS = ("attention", "mlp", "shared_experts", "experts")
"""Groups whose matrices 4-bit loading quantises."""


@dataclass(frozen=True)
class Place:
    """One tensor of a checkpoint, and its place in the model in memory.

    Attributes:
        parameter: Name of the model's parameter that holds it.
        shape: Shape on disk.
        group: One of `LORA_GROUPS`, or norms, embeddings, head, other. A bias belongs to the group of its weight.
        layer: Index of its layer.
        expert: The expert's id. The parameter is then a stack (E, …), and the tensor one slice of it.
        in_by_out: True if the matrix is stored in×out on disk, False if out×in like `nn.Linear`.
        part: The expert's projection (`gate_proj` or `up_proj`), if several share a stack.
        float32: True if it is held in float32 whatever the model's dtype.
        correction: True for a router's correction term, which is never trained: a buffer in memory.
    """

    parameter: str
    shape: tuple[int, ...]
    group: str
    layer: int | None = None
    expert: int | None = None
    in_by_out: bool = False
    part: str | None = None
    float32: bool = False
    correction: bool = False

    @property
    def quantized(self) -> bool:
        """True if 4-bit loading quantises this tensor."""
        return self.group in QUANTIZED_GROUPS and len(self.shape) == 2

    @property
    def transposed(self) -> bool:
        """True if disk and memory differ in orientation: in memory, linear layers are out×in, experts as on disk."""
        return self.in_by_out and self.expert is None

    @property
    def module(self) -> str:
        """Name of the module in memory that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Name of the parameter within its module."""
        return self.parameter.rpartition(".")[2]

    @property
    def out_in(self) -> tuple[int, int]:
        """(outputs, inputs) of a matrix."""
        rows, columns = self.shape
        return (columns, rows) if self.in_by_out else (rows, columns)
