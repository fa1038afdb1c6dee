"""A dense baseline's files, which PEFT, transformers and safetensors write: sizes to the byte, headers included."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from lola_ft.adapters.settings import AdapterSettings
from lola_ft.baseline.checkpoint import MERGED_SHARD
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_file import DTYPE_NAMES
from lola_ft.errors import CheckpointError
from lola_ft.planning.adapter import AdapterSizes
from lola_ft.planning.dense.config import DenseConfig
from lola_ft.planning.merged import stated_dtype

_FLOAT = 4


def dense_adapter(config: DenseConfig, settings: AdapterSettings) -> AdapterSizes:
    """LoRA of attention and MLP, in float32 in the model as in its file."""
    tensors: dict[str, torch.Tensor] = {}
    for name in config.shapes:
        rank = settings.ranks().get(config.group_of(name) or "")
        if rank is not None:
            size_out, size_in = config.out_by_in(name)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.empty(rank, size_in, device="meta")
            tensors[f"{module}.lora_B.weight"] = torch.empty(size_out, rank, device="meta")
    numels = [tensor.numel() for tensor in tensors.values()]
    return AdapterSizes(_FLOAT * sum(numels), file_bytes(tensors, {"base_fingerprint": "0" * 16}), numels)


def dense_merged_files(folder: Path, config: DenseConfig, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of each file of weights that `merge.py` will write.

    Args:
        folder: The base's; of its weights at most the headers are read. Without them the dtype in its config counts.
        dtype: Of the merged tensors; None keeps the base's.
    """
    own = dtype or _stored_dtype(folder)
    tensors = {name: torch.empty(shape, dtype=own, device="meta") for name, shape in config.shapes.items()}
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=MERGED_SHARD).filename_to_tensors
    return {
        file: file_bytes({name: tensors[name] for name in names}, {"format": "pt"}) for file, names in shards.items()
    }


def file_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Size of what safetensors' own writer makes of tensors: sorted, a header without blanks, padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def _stored_dtype(folder: Path) -> torch.dtype:
    try:
        return BaseCheckpoint.open(folder).dtype
    except CheckpointError:
        return stated_dtype(folder)
