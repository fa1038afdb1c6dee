"""A run with its experts in host memory learns the same adapter, resumes, is merged, and generates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from lola_ft import open_model
from tests.conftest import Outcome, make_base
from tests.simulated_device import SimulatedTransfers, simulate
from tests.training.conftest import recipe_dict


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with three MoE layers, one more than there are buffers."""
    return make_base(tmp_path_factory.mktemp("base") / "base", n_layer=6)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedTransfers]:
    """Simulated devices, one for each base that is loaded with experts in host memory."""
    return simulate(monkeypatch)


def write(folder: Path, base: Path, rows: Path, kept: str, **train: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"max_steps": 4, "save_every": 2, "gradient_checkpointing": True} | train
    recipe = recipe_dict(base, rows, folder / "run", base={"offload": kept}, train=settings)
    YAML().dump(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_it_learns_resumes_merges_and_answers(
    base: Path,
    rows_file: Path,
    tmp_path: Path,
    verb: Callable[..., Outcome],
    devices: list[SimulatedTransfers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = write(tmp_path / "plain", base, rows_file, "none")
    done = verb("train", plain)
    assert done.code == 0
    assert "experts in host memory" not in " ".join((done.out + done.err).split())
    assert not devices
    kept = write(tmp_path / "kept", base, rows_file, "experts", max_steps=2)
    done = verb("train", kept)
    assert done.code == 0
    assert "experts in host memory" in " ".join((done.out + done.err).split())
    assert len(devices) == 1
    expected = adapter_of(tmp_path / "plain")

    # Two more steps without offloading. No number depends on it, so it may change.
    allowed = ("--resume", "--allow-changed", "train.max_steps")
    resumed = verb("train", kept, "train.max_steps=4", "base.offload=none", *allowed)
    assert resumed.code == 0, resumed.err
    assert len(devices) == 1
    whole = write(tmp_path / "whole", base, rows_file, "experts")
    assert verb("train", whole).code == 0
    for name, tensor in adapter_of(tmp_path / "whole").items():
        assert torch.equal(tensor, expected[name]), name
    manifest = json.loads((tmp_path / "whole" / "run" / "manifest.json").read_text())
    assert manifest["recipe"]["base"]["offload"] == "experts"

    merged = verb("merge", tmp_path / "whole" / "run")
    assert merged.code == 0, merged.err
    assert verb("merge", tmp_path / "plain" / "run").code == 0
    file = Path("run") / "merged" / "model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()

    # On a GPU, `generate` offloads as the run did.
    loaded = len(devices)
    monkeypatch.setattr(open_model, "_offload", lambda subject, *_: subject.offload)
    question = ("--prompt", "Name 3", "--max-new-tokens", "8")
    answers = [verb("generate", tmp_path / name / "run", *question) for name in ("whole", "plain")]
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert answers[0].out == answers[1].out
    assert len(devices) == loaded + 1


def test_it_is_refused_without_a_gpu(base: Path, rows_file: Path, tmp_path: Path, verb: Callable[..., Outcome]) -> None:
    done = verb("train", write(tmp_path / "kept", base, rows_file, "experts"))
    assert done.code == 2
    assert "there is no GPU here" in done.err
    assert not (tmp_path / "kept" / "run").exists()


def test_it_needs_4_bit(base: Path, rows_file: Path, tmp_path: Path, verb: Callable[..., Outcome]) -> None:
    done = verb("train", write(tmp_path / "kept", base, rows_file, "experts"), "base.quantization=none")
    assert done.code == 2
    assert "base.offload" in done.err
