"""Prediction for experts in host memory: bytes on both sides, and the time of the copies against the computation.

An example, LOLA with 12 MoE layers: the host has 12 stores, the GPU two buffers of one store each. A micro batch copies
10 stores forward and 10 backward, because two are still in the buffers each time.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lola_ft.kernels.nf4_sizes import LAYERS_ON_DEVICE, packed_sizes, starts_of_store
from lola_ft.planning.job import Job
from lola_ft.planning.sizes import show_size

LINK_BYTES = 20e9
"""Bytes per second from pinned memory over PCIe 4.0 x16; half of this over 3.0 or x8. An estimate."""
MATMUL_FLOPS = 30e12
"""Floating point operations per second (two per multiply-add) of a GPU of 8 to 12 GB in 16 bits. An estimate."""


@dataclass(frozen=True)
class Offloading:
    """The memory and time of a run with `base.offload: experts`."""

    job: Job

    @cached_property
    def layer(self) -> int:
        """Bytes of one MoE layer's store."""
        sizes, layout = self.job.sizes, self.job.architecture.family.experts
        assert layout is not None, "only a base with experts can keep them in host memory"
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
        """Bytes of the buffers on the GPU."""
        return self.layer * min(LAYERS_ON_DEVICE, len(self.job.sizes.moe_layers))

    @property
    def copied(self) -> int:
        """Bytes that a micro batch copies to the GPU: all layers except two, forward and again backward."""
        return 2 * (self.host - self.buffers)

    @property
    def copy_seconds(self) -> float:
        """Seconds of a micro batch's copies."""
        return self.copied / LINK_BYTES

    @property
    def compute_seconds(self) -> float:
        """Seconds of a micro batch's products with frozen weights."""
        return self.job.tokens * self._flops_per_token / MATMUL_FLOPS

    @property
    def free_from(self) -> int:
        """Tokens per micro batch for which the computation takes as long as the copies."""
        return round(self.copy_seconds * MATMUL_FLOPS / self._flops_per_token)

    @property
    def _flops_per_token(self) -> float:
        """Floating point operations per token: two for each active weight and pass."""
        passes = 3 if self.job.checkpointing else 2  # forward, again with checkpointing, and the gradient of the input
        return 2 * passes * self.job.architecture.active_parameters

    def line(self) -> str:
        """Return the memory and the times as one paragraph for people to read."""
        return (
            f"The experts, {show_size(self.host)} in 4 bit, are in host memory. A micro batch copies "
            f"{show_size(self.copied)} to the GPU: about {self.copy_seconds:.2f} s at {LINK_BYTES / 1e9:.0f} GB/s, "
            f"during about {self.compute_seconds:.2f} s of matrix products at {MATMUL_FLOPS / 1e12:.0f} TFLOP/s "
            f"(estimates). With {self.free_from:,} tokens or more per micro batch, the copies cost no time."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the same numbers for JSON."""
        return {
            "host_bytes": self.host,
            "gpu_bytes": self.buffers,
            "copied_bytes_per_micro_batch": self.copied,
            "copy_s": round(self.copy_seconds, 4),
            "compute_s": round(self.compute_seconds, 4),
            "free_from_tokens": self.free_from,
        }
