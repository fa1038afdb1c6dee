"""A training state on disk: plain values in JSON and tensors in safetensors, never a pickle.

Dictionaries (also with numbers as keys), tuples and lists keep their types, and floats keep every bit.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

VALUES_FILE, TENSORS_FILE = "state.json", "state.safetensors"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state: nested dictionaries, lists and tuples of numbers, text, bools, None and tensors."""
    tensors: dict[str, Tensor] = {}
    values = _packed(state, tensors)
    save_file(tensors, folder / TENSORS_FILE)
    (folder / VALUES_FILE).write_text(json.dumps(values), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Read a state that `write_state` wrote; tensors are on the CPU.

    Raises:
        OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError: The files are damaged.
    """
    tensors = load(
        (folder / TENSORS_FILE).read_bytes()
    )  # not mapped, because the file may be removed while its tensors are in use
    return _unpacked(json.loads((folder / VALUES_FILE).read_text(encoding="utf-8")), tensors)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value in JSON's types; a type that JSON lacks becomes an object whose single key names the type."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        # Copied, because safetensors refuses tensors that share memory, as some of optimisers do.
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
