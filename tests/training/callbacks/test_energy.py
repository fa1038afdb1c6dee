"""Energy by codecarbon: offline, added up over a resume, and said how it was found."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.recipe import load_recipe
from lola_ft.training import train
from lola_ft.training.checkpointing.state_file import read_state

pytest.importorskip("codecarbon")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
def test_energy_of_a_resumed_run_includes_what_was_used_before(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    energy = {"energy": {"country": "DEU"}, "max_steps": 3, "save_every": 2}
    train(load_recipe(recipe_file(train=energy)))
    run = tmp_path / "run"
    checkpoint = read_state(run / "checkpoints" / "step-2")
    until_then = checkpoint["kept"]["energy"]["kwh"]
    figures = json.loads((run / "manifest.json").read_text())["energy"]
    assert figures["kwh"] > until_then > 0
    tokens = json.loads((run / "manifest.json").read_text())["results"]["tokens"]
    assert figures["kwh_per_million_tokens"] == pytest.approx(figures["kwh"] / tokens * 1e6, rel=1e-2)
    assert 200 < figures["grid_g_co2_per_kwh"] < 600
    assert figures["g_co2"] == pytest.approx(figures["kwh"] * figures["grid_g_co2_per_kwh"], rel=1e-2)
    rapl = Path("/sys/class/powercap/intel-rapl/subsystem").exists()
    assert rapl or "CPU: estimated from" in figures["measured"]
    assert "no RAPL" in figures["measured"] or rapl
    assert "## Energy" in (run / "README.md").read_text()
    for name in ("README.md", "manifest.json"):
        (run / name).unlink()
    train(load_recipe(recipe_file(train=energy)), resume=True)
    again = json.loads((run / "manifest.json").read_text())["energy"]
    assert again["kwh"] > until_then


def test_an_unknown_country_is_refused(recipe_file: Callable[..., Path], verb: Callable[..., Any]) -> None:
    outcome = verb("train", recipe_file(train={"energy": {"country": "XXX"}}))
    assert outcome.code == 2
    assert "codecarbon knows no country 'XXX'" in outcome.err
