"""Experts in host memory: bytes on both sides, and the time of the copies beside that of the computation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lola_ft.kernels.nf4_sizes import packed_sizes, starts_of_store
from lola_ft.planning.job import Job
from lola_ft.planning.sizes import show_size

_BUFFERS = 2  # layers on the GPU at a time: `quantization/layer_copies.py`
LINK_BYTES = 20e9
"""Bytes per second from pinned memory over PCIe 4.0 x16; half of it over 3.0 or x8. An estimate."""
MATMUL_FLOPS = 30e12
"""Products per second, twice as many operations, that a GPU of 8 to 12 GB reaches in 16 bits. An estimate."""


@dataclass(frozen=True)
class Offloading:
    """What `base.offload: experts` means for a run."""

    job: Job

    @cached_property
    def layer(self) -> int:
        """Bytes of one MoE layer's store."""
        sizes, layout = self.job.sizes, self.job.architecture.family.experts
        assert layout is not None, "only a base with experts keeps them elsewhere"
        packed, blocks, superblocks = packed_sizes(sizes.hidden * sizes.expert_inner)
        tensors = []
        for names in layout.stacks.values():
            matrices = sizes.num_experts * len(names)
            tensors += [matrices * size for size in (packed, blocks, 4 * superblocks, 4)]
        return starts_of_store(tensors)[1]

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return self.layer * len(self.job.sizes.moe_layers)

    @property
    def buffers(self) -> int:
        """Bytes on the GPU."""
        return self.layer * min(_BUFFERS, len(self.job.sizes.moe_layers))

    @property
    def copied(self) -> int:
        """Bytes that a micro batch brings to the GPU: all layers but two, forward and again backward."""
        return 2 * (self.host - self.buffers)

    @property
    def copy_seconds(self) -> float:
        return self.copied / LINK_BYTES

    @property
    def compute_seconds(self) -> float:
        """Seconds of a micro batch's products with frozen weights."""
        return self.job.tokens * self._flops_per_token / MATMUL_FLOPS

    @property
    def free_from(self) -> int:
        """Tokens per micro batch from which on the computation takes as long as the copies beside it."""
        return round(self.copy_seconds * MATMUL_FLOPS / self._flops_per_token)

    @property
    def _flops_per_token(self) -> float:
        passes = 3 if self.job.checkpointing else 2  # forward, perhaps again, and the input's gradient
        return 2 * passes * self.job.architecture.active_parameters

    def line(self) -> str:
        """For people to read."""
        return (
            f"The experts, {show_size(self.host)} in 4 bit, are in host memory. A micro batch brings "
            f"{show_size(self.copied)} of them to the GPU: about {self.copy_seconds:.2f} s at {LINK_BYTES / 1e9:.0f} "
            f"GB/s, beside about {self.compute_seconds:.2f} s of products at {MATMUL_FLOPS / 1e12:.0f} TFLOP/s "
            f"(estimates). From about {self.free_from:,} tokens per micro batch on, the copies cost no time."
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "host_bytes": self.host,
            "gpu_bytes": self.buffers,
            "copied_bytes_per_micro_batch": self.copied,
            "copy_s": round(self.copy_seconds, 4),
            "compute_s": round(self.compute_seconds, 4),
            "free_from_tokens": self.free_from,
        }
