"""A base from the Hub's cache, in the revision that the adapter was trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import lola_ft
from lola_ft.adapters.convert import convert_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.fingerprint import fingerprint

BASE_ID, OLD, NEW = "someone/lola", "a" * 40, "b" * 40


@pytest.fixture
def cached(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions of a base, the first without a name, and no access to the network."""
    repo = tmp_path / "hub" / "models--someone--lola"
    for commit in (OLD, NEW):
        shutil.copytree(tiny_base, repo / "snapshots" / commit)
        config = json.loads((tiny_base / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_lola_gpt2.LOLAConfig"}
        (repo / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    file = repo / "snapshots" / NEW / "model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo


def test_an_adapter_names_the_revision_that_it_was_made_on(cached: Path, adapter: Path, tmp_path: Path) -> None:
    def named(revision: str | None) -> tuple[str, str | None]:
        model = lola_ft.load_base(BASE_ID, None, "float32", revision=revision, quiet=True)
        lola_ft.save_adapter(lola_ft.load_adapter(model, adapter), tmp_path / "saved")
        convert_adapter(tmp_path / "saved", cached / "snapshots" / OLD, "per_expert", tmp_path / str(revision))
        config = json.loads((tmp_path / str(revision) / "adapter_config.json").read_text())
        return config["base_model_name_or_path"], config["revision"]

    assert named(OLD) == (BASE_ID, OLD)
    assert named("main") == (BASE_ID, NEW)


def test_the_revision_that_the_adapter_names_is_merged_into(
    cached: Path, adapter: Path, tmp_path: Path, verb: Callable[..., Any]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": BASE_ID, "revision": OLD}
    (adapter / "adapter_config.json").write_text(json.dumps(named))

    def base_of_merge(name: str, *options: str) -> str:
        done = verb("merge", adapter, "--out", tmp_path / name, "--check", "weights", *options)
        assert done.code == 0, done.err
        return str(json.loads((tmp_path / name / "merge_report.json").read_text())["base_fingerprint"])

    old, new = (fingerprint(BaseCheckpoint.open(cached / "snapshots" / commit)) for commit in (OLD, NEW))
    assert base_of_merge("own") == old
    # A base that the user names is used without the adapter's revision, which belongs to the adapter's own base.
    assert base_of_merge("given", "--base", BASE_ID) == new

    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_lola.LolaConfig"  # the folder's code, not the base's
    assert BASE_ID in (tmp_path / "own" / "README.md").read_text()
