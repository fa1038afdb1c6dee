"""A base on the Hub is pinned to the commit that its branch stands for when a run begins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file

from lola_ft.checkpoints import folder as folder_module
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from tests.families.conftest import make_dense

BASE_ID, THEN, LATER = "someone/base", "a" * 40, "b" * 40


@pytest.fixture(params=["lola", "gpt2"])
def repo(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cached base with one commit, of two families; nothing else can be reached."""
    base = tiny_base if request.param == "lola" else make_dense(tmp_path / "gpt2", "gpt2")
    repo = tmp_path / "hub" / "models--someone--base"
    shutil.copytree(base, repo / "snapshots" / THEN)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(THEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo


@pytest.mark.slow
def test_recipe_manifest_and_adapter_name_the_commit(
    repo: Path, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[object] = []
    monkeypatch.setattr(
        folder_module, "snapshot_download", lambda *a, **k: resolved.append(a) or snapshot_download(*a, **k)
    )
    adapter = {"adapter": {"attention": {"rank": 4}, "mlp": {"rank": 4}, "experts": None}}
    file = recipe_file(base={"model": BASE_ID, "dtype": "float32"}, train={"save_every": 2}, **adapter)
    run = train(load_recipe(file))
    assert len(resolved) == 1  # once for the whole command
    assert load_recipe(run / "recipe.yaml").base.revision == THEN
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["base"]["id"], manifest["base"]["revision"]) == (BASE_ID, THEN)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["revision"] == THEN

    # The branch moves on; a run that is resumed stays with its commit, and so does a merge.
    shutil.copytree(repo / "snapshots" / THEN, repo / "snapshots" / LATER)
    weights = repo / "snapshots" / LATER / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    (repo / "refs" / "main").write_text(LATER)
    for name in ("manifest.json", "README.md"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    again = train(load_recipe(file), resume=True)
    assert load_recipe(again / "recipe.yaml").base.revision == THEN
    assert json.loads((again / "adapter" / "adapter_config.json").read_text())["revision"] == THEN
