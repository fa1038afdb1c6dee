"""The prediction of a run's peak memory, by part.

Weights, adapter, gradients and optimiser state are there all the time. At one of three moments the work space on top of
them is largest:

    loss             all saved activations  +  one chunk of logits with its softmax and gradient
    backward pass    all saved activations  +  the recomputed layer  +  one part's gradients and dense weights
    optimizer step   no activations         +  the optimiser's work space

The peak is the largest of the three sums. An example, `recipes/instruct.yaml` (LOLA in 4 bit) on a GPU:

    weights 4.16 GB  +  adapter 0.16  +  its gradients in float32 0.16  +  8-bit AdamW 0.08  +  CUDA context 0.60
    activations 0.49 GB: with gradient checkpointing, the inputs of the layers for 4 rows of 1,024 tokens
    work space 1.51 GB in the backward pass: one layer recomputed, and its experts dequantised
    together 7.16 GB, in the backward pass
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lola_ft.families.parts import Audit
from lola_ft.planning.adapter_sizes import adapter_sizes
from lola_ft.planning.base_weights import base_audit
from lola_ft.planning.job import Job
from lola_ft.planning.offloading import Offloading
from lola_ft.planning.optimizer import OptimizerBytes, optimizer_bytes
from lola_ft.planning.saved_for_backward import Activations, activations
from lola_ft.planning.workspace import backward_work, loss_work

_FLOAT = 4
CONTEXT_BYTES = {"cuda": 600_000_000, "cpu": 900_000_000}
"""Estimated bytes of the CUDA context with the libraries' kernels and work space, and of Python with the libraries."""


@dataclass(frozen=True)
class Fixed:
    """The memory that does not depend on the batch, counted exactly.

    Attributes:
        adapter: Bytes that the adapter adds to the model.
        adapter_file: Size of `adapter_model.safetensors`.
        trained: Number of trained values, each with a float32 gradient.
    """

    base: Audit
    adapter: int
    adapter_file: int
    trained: int
    optimizer: OptimizerBytes


@dataclass(frozen=True)
class Prediction:
    """Peak memory of training.

    Attributes:
        moment: The moment of the peak: `loss`, `backward pass` or `optimizer step`.
        work: Bytes of work space at that moment.
    """

    job: Job
    fixed: Fixed
    activations: Activations
    moment: str
    work: int

    @cached_property
    def offloading(self) -> Offloading | None:
        """The experts in host memory; None without offloading."""
        return Offloading(self.job) if self.job.offload else None

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part at the peak, without paged optimiser state, which may leave the GPU."""
        kept = 0 if self.moment == "optimizer step" else self.activations.saved + self.activations.held
        weights, offloading = self.fixed.base.total_bytes, self.offloading
        if offloading:
            weights += offloading.buffers - offloading.host
        return {
            "weights": weights,
            "adapter": self.fixed.adapter,
            **({"reference": self.fixed.adapter} if self.job.reference else {}),
            "gradients": _FLOAT * self.fixed.trained,
            "optimizer": self.fixed.optimizer.state,
            "activations": kept,
            "work space": self.work,
            "context": CONTEXT_BYTES[self.job.device],
        }

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """The total without the context, as `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.parts["context"]

    def as_dict(self) -> dict[str, Any]:
        """Return the prediction as plain values, for JSON."""
        return {
            "peak_bytes": self.total,
            "moment": self.moment,
            "parts": {name.replace(" ", "_"): size for name, size in self.parts.items()},
            "paged_optimizer_bytes": self.fixed.optimizer.paged,
            "weights": self.fixed.base.as_dict(),
            "trained_parameters": self.fixed.trained,
            **({"offload": self.offloading.as_dict()} if self.offloading else {}),
        }


def count_fixed(job: Job) -> Fixed:
    """Count weights, adapter, gradients and optimiser state.

    Raises:
        UserError: The base lacks a group that the settings train, or the selection of experts does not fit the base.
    """
    adapter = adapter_sizes(job.architecture, job.settings)
    return Fixed(
        base_audit(job.architecture, job.quantization, job.dtype),
        adapter.held,
        adapter.file,
        sum(adapter.numels),
        optimizer_bytes(job.optimizer, adapter.numels, job.on_cuda),
    )


def predict(job: Job, fixed: Fixed | None = None) -> Prediction:
    """Predict the peak memory of a run.

    Args:
        fixed: The result of `count_fixed` for this run, if already known.
    """
    fixed = fixed or count_fixed(job)
    kept = activations(job)
    # Both moments have all activations in memory, so the one with more work space is higher.
    work = {"loss": loss_work(job), "backward pass": kept.recomputed + backward_work(job)}
    moment = max(work, key=lambda name: work[name])
    # The optimiser steps after the activations are freed.
    if kept.saved + kept.held + work[moment] < fixed.optimizer.work:
        return Prediction(job, fixed, kept, "optimizer step", fixed.optimizer.work)
    return Prediction(job, fixed, kept, moment, work[moment])
