"""The check before sending: it passes what is equal and refuses what is not, each seen to fail."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lola_ft.adapters.checksums import CHECKSUMS_KEY
from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.errors import AdapterError, CheckpointError, PublishError
from lola_ft.hub import reload_check
from lola_ft.hub.publication import find_source
from lola_ft.hub.reload_check import check_in_fresh_process, compare_adapter, compare_merged
from tests.tiny import TINY

GOLDEN = Path(__file__).parents[1] / "golden"


def change(file: Path, ending: str, factor: float) -> None:
    """Multiply the tensors whose name ends so; the file does not say that they were others."""
    with safe_open(file, framework="pt") as handle:
        metadata = {key: text for key, text in handle.metadata().items() if key != CHECKSUMS_KEY}
    weights = load_file(file)
    save_file({k: v * factor if k.endswith(ending) else v for k, v in weights.items()}, file, metadata=metadata)


def test_an_equal_adapter_passes_exactly(tiny_base: Path, tiny_adapter: Path, adapter: Path) -> None:
    found = compare_adapter(tiny_base, tiny_adapter, adapter)
    assert found.max_logit_difference == 0
    assert found.tokens == 6 * 32
    assert found.largest_logit > 0


def test_a_converted_adapter_passes(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    convert_adapter(tiny_adapter, tiny_base, "per_expert", tmp_path / "converted")
    assert compare_adapter(tiny_base, tiny_adapter, tmp_path / "converted").max_logit_difference == 0


def test_an_adapter_of_the_4_bit_base_alone_is_compared_there(tiny_base: Path, adapter: Path) -> None:
    """LoftQ's start belongs to the 4-bit base; a small base is else compared unquantised."""
    weights = read_adapter(adapter).weights(TINY)
    weights.starts_at_rounding_error = True
    write_adapter(weights, adapter, "peft")
    assert compare_adapter(tiny_base, adapter, adapter).max_logit_difference == 0


def test_the_authors_adapter_passes() -> None:
    assert compare_adapter(GOLDEN / "base", GOLDEN / "adapter", GOLDEN / "adapter").max_logit_difference == 0


def test_changed_weights_are_refused(tiny_base: Path, tiny_adapter: Path, adapter: Path) -> None:
    change(adapter / "adapter_model.safetensors", "experts.base_layer.lora_B.weight", 1.01)
    with pytest.raises(PublishError, match="do not compute the same as the trained model"):
        compare_adapter(tiny_base, tiny_adapter, adapter)


def test_a_changed_alpha_is_refused(tiny_base: Path, tiny_adapter: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    with pytest.raises(PublishError, match="do not compute the same as the trained model"):
        compare_adapter(tiny_base, tiny_adapter, adapter)


def test_an_adapter_that_changes_nothing_is_refused(tiny_base: Path, adapter: Path) -> None:
    change(adapter / "adapter_model.safetensors", "lora_B.weight", 0.0)
    with pytest.raises(PublishError, match="the adapter changes nothing"):
        compare_adapter(tiny_base, adapter, adapter)


def test_an_adapter_of_another_base_is_refused(adapter: Path) -> None:
    with pytest.raises(AdapterError):
        compare_adapter(GOLDEN / "base", adapter, adapter)


def test_equal_merged_weights_pass(merged: Path, tmp_path: Path) -> None:
    assert compare_merged(merged, shutil.copytree(merged, tmp_path / "staged")).max_logit_difference == 0


def test_changed_merged_weights_are_refused(merged: Path, tmp_path: Path) -> None:
    staged = Path(shutil.copytree(merged, tmp_path / "staged"))
    change(staged / "model.safetensors", "h.1.moe.experts.0.c_fc.weight", 1.1)
    with pytest.raises(PublishError, match="do not compute the same as the trained model"):
        compare_merged(merged, staged)


def test_merged_weights_that_do_not_load_are_refused(merged: Path, tmp_path: Path) -> None:
    staged = Path(shutil.copytree(merged, tmp_path / "staged"))
    weights = load_file(staged / "model.safetensors")
    weights.pop("transformer.ln_f.bias")
    save_file(weights, staged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ln_f\.bias"):
        compare_merged(merged, staged)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The checks' commands, carried out in this process: a process of its own imports torch (`test_hub_cli.py` has it).

    Returns:
        The environments that they were given.
    """
    environments: list[dict[str, Any]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
        assert command[:3] == [sys.executable, "-m", reload_check.__name__]
        environments.append(env)
        monkeypatch.setattr(sys, "argv", command[2:])
        code, out, err = 0, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                reload_check.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(subprocess, "run", run)
    return environments


def test_the_process_of_the_check_is_given_what_to_compare_and_its_answer_is_read(
    commands: list[dict[str, Any]], tiny_base: Path, tiny_adapter: Path, adapter: Path, merged: Path
) -> None:
    source = find_source(tiny_adapter)
    said = check_in_fresh_process(source, adapter, tiny_base)
    assert "compared with" in said
    assert "on 192 tokens: largest logit difference 0 (largest logit" in said
    assert "on 192 tokens: largest" in check_in_fresh_process(find_source(merged), merged, None)
    assert [environment["HF_HUB_OFFLINE"] for environment in commands] == ["1", "1"]
    change(adapter / "adapter_model.safetensors", "lora_B.weight", 1.01)
    with pytest.raises(PublishError, match="do not compute the same as the trained model"):
        check_in_fresh_process(source, adapter, tiny_base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(PublishError, match=r"adapter_model\.safetensors"):
        check_in_fresh_process(source, adapter, tiny_base)
