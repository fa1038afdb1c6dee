"""The kinds of bases that can be planned for: what of a plan depends on how their layers are made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lola_ft.adapters.settings import AdapterSettings
from lola_ft.families.parts import Audit
from lola_ft.planning.activations import Activations, activations
from lola_ft.planning.adapter import AdapterSizes, adapter_sizes
from lola_ft.planning.base import base_audit
from lola_ft.planning.dense.activations import dense_activations
from lola_ft.planning.dense.base import dense_audit
from lola_ft.planning.dense.config import DenseConfig
from lola_ft.planning.dense.files import dense_adapter, dense_merged_files
from lola_ft.planning.dense.workspace import dense_backward_work
from lola_ft.planning.job import Job
from lola_ft.planning.merged import merged_files
from lola_ft.planning.workspace import backward_work


@dataclass(frozen=True)
class Kind:
    """How the parts of a plan are counted for one kind of base; each takes its own config.

    Attributes:
        audit: The loaded base, from its config, quantization and dtype.
        adapter: What is trained, from config and settings.
        activations, backward_work: Of a job.
        merged_files: Sizes by name, from the base's folder, its config and the dtype of the merged weights.
    """

    audit: Callable[[Any, str | None, str], Audit]
    adapter: Callable[[Any, AdapterSettings], AdapterSizes]
    activations: Callable[[Job], Activations]
    backward_work: Callable[[Job], int]
    merged_files: Callable[[Path, Any, torch.dtype | None], dict[str, int]]


_LOLA = Kind(base_audit, adapter_sizes, activations, backward_work, merged_files)
_DENSE = Kind(dense_audit, dense_adapter, dense_activations, dense_backward_work, dense_merged_files)


def kind_of(config: Any) -> Kind:
    """How a base with this config is planned for."""
    return _DENSE if isinstance(config, DenseConfig) else _LOLA
