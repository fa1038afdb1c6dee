"""A checkpoint folder that cannot be used is refused by one message that names file and tensor."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lola_ft.checkpoints import safetensors_file
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import resolve_folder
from lola_ft.errors import CheckpointError

C_PROJ = "transformer.h.1.moe.experts.2.c_proj.weight"


def set_tensor(folder: Any, name: str, tensor: torch.Tensor | None) -> None:
    """Replace one tensor, or remove it if None."""
    tensors = folder.tensors
    tensors.pop(name, None)
    folder.set_tensors(tensors if tensor is None else tensors | {name: tensor})


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        del header[C_PROJ][key]
        return header

    return change


def with_offsets(start: int, end: int) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        header[C_PROJ]["data_offsets"] = [start, end]
        return header

    return change


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


# name: (what to break, words of the message). In the words, {…} are paths of the folder.
BROKEN: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "no config": (lambda f: f.config_file.unlink(), ["{config_file}: no such file"]),
    "config is not JSON": (lambda f: f.config_file.write_text("{'a'"), ["{config_file}: not valid JSON"]),
    "config is not UTF-8": (lambda f: f.config_file.write_bytes(b"\xff\xfe\xff"), ["{config_file}: not valid JSON"]),
    "config is a list": (lambda f: f.config_file.write_text("[1]"), ["{config_file}: holds a list, not an object"]),
    "another model": (
        lambda f: f.set_config(model_type="t5"),
        ["{config_file}: model_type is 't5'", "lola_v1", "gpt2"],
    ),
    "no model type": (lambda f: f.config_file.write_text("{}"), ["{config_file}: model_type is 'None'"]),
    "two experts a token": (lambda f: f.set_config(topk=2), ["{config_file}: topk is 2"]),
    "a size that is text": (lambda f: f.set_config(n_head="4"), ["{config_file}: n_head is '4'"]),
    "no weights": (lambda f: f.weights_file.unlink(), ["{path}: holds neither model.safetensors nor"]),
    "empty file": (lambda f: cut(f.weights_file, 0), ["{weights_file}: not a whole safetensors file"]),
    "header cut off": (lambda f: cut(f.weights_file, 100), ["{weights_file}: not a whole safetensors file"]),
    "not safetensors": (lambda f: f.weights_file.write_bytes(b"PK\x03\x04" * 999), ["not a whole safetensors file"]),
    "header garbage": (
        lambda f: f.weights_file.write_bytes(struct.pack("<Q", 64) + b"\x93garbage" * 100),
        ["{weights_file}: its safetensors header is damaged"],
    ),
    "header is a list": (lambda f: rewrite_header(f.weights_file, list), ["{weights_file}", "header is damaged"]),
    "no shape": (lambda f: rewrite_header(f.weights_file, without("shape")), ["{weights_file}", "header is damaged"]),
    "no dtype": (lambda f: rewrite_header(f.weights_file, without("dtype")), ["{weights_file}", "header is damaged"]),
    "bytes against shape": (
        lambda f: rewrite_header(f.weights_file, with_offsets(0, 400)),
        ["{weights_file}: tensor '" + C_PROJ + "' takes 400 bytes, which its shape and dtype contradict"],
    ),
    "data before the file": (
        lambda f: rewrite_header(f.weights_file, with_offsets(-32768, 0)),
        ["{weights_file}: tensor '" + C_PROJ],
    ),
    "last tensor cut off": (
        lambda f: cut(f.weights_file, f.weights_file.stat().st_size - 1),
        ["{weights_file}: truncated: tensor 'transformer.", "Download it again"],
    ),
    "cut in the middle": (
        lambda f: cut(f.weights_file, f.weights_file.stat().st_size // 2),
        ["{weights_file}: truncated: tensor 'transformer."],
    ),
    "missing tensor": (lambda f: set_tensor(f, C_PROJ, None), ["{path}: 1 weights that", "are missing: " + C_PROJ]),
    "more experts in config": (lambda f: f.set_config(num_experts=5), ["8 weights that", "h.1.moe.experts.4.c_fc"]),
    "fewer experts in config": (lambda f: f.set_config(num_experts=3), ["8 tensors that", "does not call for"]),
    "extra tensor": (
        lambda f: set_tensor(f, "transformer.h.0.attn.rotary", torch.ones(3)),
        ["{path}: 1 tensors that config.json does not call for: transformer.h.0.attn.rotary"],
    ),
    "wrong shape": (
        lambda f: set_tensor(f, C_PROJ, torch.ones(64, 128)),
        ["{weights_file}: tensor '" + C_PROJ + "' has shape [64, 128], but config.json calls for [128, 64]"],
    ),
    "integer weight": (
        lambda f: set_tensor(f, C_PROJ, torch.ones(128, 64, dtype=torch.int8)),
        ["{weights_file}: tensor '" + C_PROJ + "' is I8", "F32, F16 or BF16"],
    ),
    "missing shard": (
        lambda f: f.shard()[1].unlink(),
        ["{index_file}", "do not exist: model-00002-of-00003.safetensors"],
    ),
    "truncated shard": (lambda f: cut(f.shard()[2], 9000), ["model-00003-of-00003.safetensors: truncated: tensor '"]),
    "index is not JSON": (lambda f: (f.shard(), f.index_file.write_text("")), ["{index_file}: not valid JSON"]),
    "index without map": (lambda f: (f.shard(), f.index_file.write_text("{}")), ["{index_file}: its weight_map"]),
    "index with a list": (
        lambda f: (f.shard(), f.index_file.write_text('{"weight_map": ["a"]}')),
        ["{index_file}: its weight_map"],
    ),
    "empty index": (
        lambda f: (f.shard(), f.index_file.write_text('{"weight_map": {}}')),
        ["{index_file}: its weight_map names no shard"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(case: str, folder: Any) -> None:
    break_it, words = BROKEN[case]
    break_it(folder)
    with pytest.raises(CheckpointError) as caught:
        BaseCheckpoint.open(folder.path)
    message = str(caught.value)
    for part in words:
        for name in ("config_file", "weights_file", "index_file", "path"):
            part = part.replace("{" + name + "}", str(getattr(folder, name)))
        assert part in message
    assert "\n" not in message


def test_a_file_that_shrinks_after_opening_is_refused(folder: Any) -> None:
    checkpoint = BaseCheckpoint.open(folder.path)
    last = max(checkpoint, key=lambda entry: entry.start)
    cut(folder.weights_file, last.start + last.num_bytes // 2)
    with pytest.raises(CheckpointError, match="truncated"):
        last.read()


@pytest.mark.parametrize("path", ["nowhere", "./some/where", "/no/such/folder", "a/b/c", "~/lola"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_folder(path)


def test_a_file_instead_of_a_folder_is_refused(folder: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file; give the checkpoint's folder"):
        BaseCheckpoint.open(folder.weights_file)


def test_an_invalid_hub_id_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"some one/none: no such folder in .* Give .* a Hub id like owner/name"):
        resolve_folder("some one/none")


@pytest.mark.parametrize("shards", [0, 1, 4])
def test_every_tensor_is_read_as_stored(shards: int, folder: Any) -> None:
    expected = folder.tensors
    if shards:
        folder.shard(shards)
    checkpoint = BaseCheckpoint.open(folder.path)
    assert set(checkpoint.entries) == set(expected)
    assert len(checkpoint.files) == max(shards, 1)
    places = [(entry.file, entry.start) for entry in checkpoint]
    assert places == sorted(places)
    for entry in checkpoint:
        tensor = entry.read()
        assert tensor.dtype == expected[entry.name].dtype
        assert torch.equal(tensor, expected[entry.name]), entry.name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_is_cast_while_it_is_read(
    stored: torch.dtype, wanted: torch.dtype, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE", 1000)  # so that a small tensor is read in several pieces
    folder.cast(stored)
    expected = folder.tensors
    for entry in BaseCheckpoint.open(folder.path):
        assert torch.equal(entry.read(wanted), expected[entry.name].to(wanted)), entry.name


def test_legacy_tensors_are_left_out_and_named(folder: Any) -> None:
    names = ["lm_head.weight", "transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]
    legacy = [torch.ones(320, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool), torch.tensor(-1e4)]
    folder.set_tensors(folder.tensors | dict(zip(names, legacy, strict=True)))
    checkpoint = BaseCheckpoint.open(folder.path)
    assert checkpoint.ignored == names
    assert not set(names) & set(checkpoint.entries)


def test_with_both_a_single_file_and_an_index_the_file_counts_as_in_transformers(folder: Any, tmp_path: Path) -> None:
    """Otherwise the dense and the 4-bit model of one folder would hold different weights."""
    shutil.copy(folder.weights_file, tmp_path / "kept")
    folder.shard()
    shutil.copy(tmp_path / "kept", folder.weights_file)
    assert BaseCheckpoint.open(folder.path).files == [folder.weights_file]
