"""The sizes of a merged model's files, to the byte, in every family and form of a base on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lola_ft import merge
from lola_ft.adapters import AdapterSettings, save_adapter
from lola_ft.checkpoints.base_checkpoint import open_config
from lola_ft.planning.merged_sizes import merged_files
from tests.grids import slow_but
from tests.planning.conftest import FAMILIES, adapted

FORMS = ("one file", "shards", "half", "without prefix", "shards without prefix")
GRID = [(family, dtype, form) for family in FAMILIES for dtype in ("auto", "bfloat16") for form in FORMS]
FAST = [
    *(("lola", "auto", form) for form in FORMS),
    ("lola", "bfloat16", "one file"),
    ("gpt2", "bfloat16", "shards"),
    ("bloom", "auto", "shards without prefix"),
]


@pytest.mark.parametrize(("family", "dtype", "form"), slow_but(FAST, GRID))
def test_merged_files_are_planned_to_the_byte(
    family: str, dtype: str, form: str, odd_bases: Callable[..., Path], tmp_path: Path
) -> None:
    model = adapted(odd_bases(family), None, "float32", AdapterSettings(attention_rank=4, mlp_rank=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.1)
    adapter = save_adapter(model, tmp_path / "adapter")
    base = stored_as(form, odd_bases(family), tmp_path / "base")
    merge(base, adapter, tmp_path / "merged", dtype=dtype, check="none", allow_other_base=True)
    wanted = None if dtype == "auto" else torch.bfloat16
    architecture = open_config(base)[1]
    planned = merged_files(base, architecture, wanted)
    assert planned == {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert (len(planned) > 1) == ("shards" in form)
    for file in base.glob("*.safetensors"):
        file.unlink()
    if form != "without prefix":  # without weights and index nothing tells that
        assert merged_files(base, architecture, wanted) == planned, "from config and index alone"


def stored_as(form: str, base: Path, folder: Path) -> Path:
    """Write a base in another form: in float16, in shards with an index, without its backbone's prefix."""
    state = load_file(base / "model.safetensors")
    if form == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    if "without prefix" in form:
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16" if form == "half" else "float32"}))
    files = [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)] if "shards" in form else ["model.safetensors"]
    weight_map = {}
    for i, file in enumerate(files):
        part = {name: state[name] for name in list(state)[i :: len(files)]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
