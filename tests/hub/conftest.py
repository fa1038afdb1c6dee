"""A fake Hub to publish to, and runs, adapters and merged models made by hand in a moment."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lola_ft.environment import hardware, library_versions
from lola_ft.merging import merge
from lola_ft.recipe import Recipe, render_recipe
from lola_ft.training.reports.manifest import write_card, write_manifest


def _fake_hub_module() -> Any:
    spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_hub"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fake_hub = _fake_hub_module()
BASE_ID = "tester/base"


@pytest.fixture(scope="session")
def make_fault() -> Callable[..., Any]:
    """Makes a fault: `make_fault("commit/main", 500, times=2)`."""
    return fake_hub.Fault


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The fake Hub, which this process takes for the real one, with a token that may write."""
    with fake_hub.serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
        yield server


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_adapter` to change."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "my-adapter"))


@pytest.fixture
def run(tiny_adapter: Path, tiny_base: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A finished run as `finetune.py` leaves it, but for the training; its base and data are local files."""
    folder = tmp_path / "runs" / "sw"
    shutil.copytree(tiny_adapter, folder / "adapter")
    recipe = Recipe.model_validate(
        {
            "base": {"model": str(tiny_base), "dtype": "float32"},
            "adapter": {"attention": {"rank": 4}, "mlp": {"rank": 8}, "experts": {"rank": 4}},
            "data": {
                "sources": [
                    {"path": str(rows_file), "format": "alpaca", "language_column": "language"},
                    {"hub": "some/dataset", "format": "alpaca", "language": "de"},
                ]
            },
            "output": str(folder),
        }
    )
    counts = {"kept": 40, "trained_tokens": 1234}
    manifest = {
        "layout": "peft",
        "recipe": recipe.model_dump(mode="json"),
        "versions": library_versions(),
        "hardware": hardware(),
        "base": {"id": str(tiny_base), "fingerprint": "0123456789abcdef", "dtype": "float32", "parts": {}},
        "trained": {"attention": {"tensors": 16, "parameters": 4096}},
        "data": {
            "sha256": {str(rows_file): "ab" * 32},
            "train": {"languages": {"de": counts, "sw": counts, "und": counts}},
            "validation": None,
        },
        "results": {"steps": 3, "mean_loss": 2.5, "eval_loss": 2.25, "eval_loss_by_language": {"sw": 2.0, "de": 2.5}},
        "routing": {"most_used_expert": {"sw": 3}},
        "energy": {"kwh": 0.125},
    }
    (folder / "recipe.yaml").write_text(render_recipe(recipe))
    write_manifest(folder, manifest)
    write_card(folder, manifest)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "checkpoints" / "step-3" / "optimizer.pt").write_bytes(b"\x80\x02")
    return folder


@pytest.fixture(scope="session")
def merged(tiny_base: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_adapter` merged; read only."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge(tiny_base, tiny_adapter, folder, check=False)
    return folder


@pytest.fixture
def no_wait() -> Callable[[float], None]:
    """Between tries."""
    return lambda _: None
