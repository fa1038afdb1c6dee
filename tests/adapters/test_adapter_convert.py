"""`convert` writes another layout with the same numbers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lola_ft.adapters import load_adapter
from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.fingerprint import fingerprint
from lola_ft.errors import AdapterError, UserError
from lola_ft.model import LolaForCausalLM
from tests.tiny import TINY

E = 4


@pytest.fixture
def adapter(everything: AdapterWeights, tiny_base: Path, tmp_path: Path) -> Path:
    everything.base, everything.base_fingerprint = "someone/lola", fingerprint(BaseCheckpoint.open(tiny_base))
    return write_adapter(everything, tmp_path / "adapter", "peft")


def test_there_and_back_gives_the_same_files(
    adapter: Path,
    everything: AdapterWeights,
    tiny_base: Path,
    tmp_path: Path,
    fresh: Callable[..., LolaForCausalLM],
    ids: Tensor,
    same: Callable[[AdapterWeights, AdapterWeights], None],
) -> None:
    there = convert_adapter(adapter, tiny_base, "per_expert", tmp_path / "there")
    assert (there.source_layout, there.tensors) == ("peft", 34)
    back = convert_adapter(tmp_path / "there", tiny_base, "peft", tmp_path / "back")
    assert (back.source_layout, back.tensors) == ("per_expert", 58)

    original = load_file(adapter / "adapter_model.safetensors")
    returned = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert original.keys() == returned.keys()
    assert all(torch.equal(original[key], returned[key]) for key in original)
    config = "adapter_config.json"
    assert (adapter / config).read_text() == (tmp_path / "back" / config).read_text()
    stored = read_adapter(tmp_path / "there")
    same(stored.weights(TINY), everything)
    assert stored.metadata["base_fingerprint"] == everything.base_fingerprint
    assert stored.config["base_model_name_or_path"] == "someone/lola"
    assert stored.config["fan_in_fan_out"] is True
    assert torch.equal(
        load_adapter(fresh(), adapter)(ids).logits, load_adapter(fresh(), tmp_path / "there")(ids).logits
    )


def test_the_authors_adapter_comes_back_bit_equal(golden_adapter: Path, golden_base: Path, tmp_path: Path) -> None:
    there = convert_adapter(golden_adapter, golden_base, "peft", tmp_path / "peft")
    assert (there.source_layout, there.tensors) == ("per_expert", 56)
    convert_adapter(tmp_path / "peft", golden_base, "per_expert", tmp_path / "back")
    original = load_file(golden_adapter / "adapter_model.safetensors")
    returned = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert original.keys() == returned.keys()
    assert all(torch.equal(original[key], returned[key]) for key in original)


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_folder_in_use_is_refused(taken: str, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / taken
    if taken == "folder":
        out.mkdir()
        (out / "mine").touch()
    else:
        out.write_text("mine")
    with pytest.raises(UserError, match=f"{taken}: exists and is not empty"):
        convert_adapter(adapter, tiny_base, "per_expert", out)
    assert out.is_file() or [path.name for path in out.iterdir()] == ["mine"]


def test_an_adapter_of_another_shape_is_refused_and_nothing_written(
    golden_base: Path, everything: AdapterWeights, tmp_path: Path
) -> None:
    everything.pairs["transformer.h.4.attn.c_attn"] = everything.pairs.pop("transformer.h.0.attn.c_attn")
    deeper = write_adapter(everything, tmp_path / "deeper", "peft")
    with pytest.raises(AdapterError, match=r"transformer.h.4.attn.c_attn: the base has no such module"):
        convert_adapter(deeper, golden_base, "per_expert", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deeper"]


@pytest.mark.slow
def test_the_command_converts_and_reports_the_tensors(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    arguments = [str(adapter), "--base", str(tiny_base), "--layout", "per_expert", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "lola_ft", "convert", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "34 tensors (peft) written to" in done.stdout
    assert read_adapter(tmp_path / "out").layout == "per_expert"


def test_an_unknown_layout_on_the_command_line_is_refused(
    adapter: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lola_ft.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(adapter), "--base", str(tiny_base), "--layout", "gguf", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: layout 'gguf' is not known; use one of peft, per_expert.\n"
    assert not (tmp_path / "out").exists()
