"""A training state on disk: plain values in JSON, tensors in safetensors, never a pickle.

Dictionaries (with numbers for keys too), tuples and lists come back as what they were, floats to the last bit.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

VALUES_FILE, TENSORS_FILE = "state.json", "state.safetensors"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state: nested dictionaries, lists and tuples of numbers, text, truth values, None and tensors."""
    tensors: dict[str, Tensor] = {}
    values = _packed(state, tensors)
    save_file(tensors, folder / TENSORS_FILE)
    (folder / VALUES_FILE).write_text(json.dumps(values), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, tensors on the CPU.

    Raises:
        OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError: It is not what was written.
    """
    tensors = load((folder / TENSORS_FILE).read_bytes())  # not mapped: the file goes while its tensors are in use
    return _unpacked(json.loads((folder / VALUES_FILE).read_text(encoding="utf-8")), tensors)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON has it: what JSON does not know is an object with one key that names its kind."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        # A copy of its own: safetensors refuses tensors that share memory, and optimisers have such.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(item, tensors) for item in value]}
    assert value is None or isinstance(value, bool | int | float | str), f"a checkpoint cannot hold {type(value)}"
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r}")
    return tuple(items) if kind == "tuple" else items
