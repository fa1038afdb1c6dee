"""A run's peak memory, by part."""

from dataclasses import dataclass
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
"""Estimates: the CUDA context with the libraries' kernels and work space; Python with the libraries."""


@dataclass(frozen=True)
class Fixed:
    """What does not depend on the batch: counted exactly.

    Attributes:
        adapter: Bytes that it adds to the model.
        adapter_file: Size of `adapter_model.safetensors`.
        trained: Numbers that are trained; each has a float32 gradient.
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
        moment: When the peak is: `loss`, `backward pass` or `optimizer step`.
        work: What that moment needs for itself.
    """

    job: Job
    fixed: Fixed
    activations: Activations
    moment: str
    work: int

    @property
    def offloading(self) -> Offloading | None:
        """What is in host memory, if anything is."""
        return Offloading(self.job) if self.job.offload else None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part at the peak; paged optimiser state is left out, for it may leave the GPU."""
        kept = 0 if self.moment == "optimizer step" else self.activations.saved + self.activations.held
        weights, elsewhere = self.fixed.base.total_bytes, self.offloading
        if elsewhere:
            weights += elsewhere.buffers - elsewhere.host
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
        """Without the context: what `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.parts["context"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        UserError: If the base lacks something that is to be trained, or the selection of experts does not fit it.
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
        fixed: The run's `count_fixed`, if it is known.
    """
    fixed = fixed or count_fixed(job)
    kept = activations(job)
    work = {"loss": loss_work(job), "backward pass": kept.recomputed + backward_work(job)}
    moment = max(work, key=lambda name: work[name])
    if kept.saved + kept.held + work[moment] < fixed.optimizer.work:
        return Prediction(job, fixed, kept, "optimizer step", fixed.optimizer.work)
    return Prediction(job, fixed, kept, moment, work[moment])
