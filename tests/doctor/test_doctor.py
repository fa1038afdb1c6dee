"""The doctor tells what works from what does not, and shows no token."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lola_ft.doctor import examine, probes, run_checks
from lola_ft.doctor.check import MissingError
from lola_ft.quantization import nf4
from tests.conftest import Outcome

Verb = Callable[..., Outcome]
TOKEN = "hf_" + "secretsecretsecret"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return tmp_path / "cache"


def test_a_working_machine_passes_every_core_check(verb: Verb, own_cache: Path) -> None:
    outcome = verb("doctor", "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 0
    assert report["works"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["cores"] >= 1
    checks = {check["name"]: check for check in report["checks"]}
    core = {name for name, check in checks.items() if check["core"]}
    assert {"torch", "bitsandbytes", "4-bit weights", "training step", "cache folder"} <= core
    assert all(checks[name]["status"] == "ok" for name in core)
    assert checks["GPU"]["status"] == ("ok" if torch.cuda.is_available() else "missing")
    assert "Hub" not in checks
    assert list(own_cache.iterdir()) == [], "the probe's file is gone"


def test_a_failed_core_check_is_named_with_advice(verb: Verb, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")

    def wrong(*_: object) -> torch.Tensor:
        return torch.zeros(256, 192)

    monkeypatch.setattr(nf4, "dequantize", wrong)
    outcome = verb("doctor")
    assert outcome.code == 1
    assert "Fine-tuning does not work here: 4-bit weights, cache folder." in " ".join(outcome.out.split())
    assert "LOLA_FT_CACHE" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err


def test_a_lack_of_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "BASE_BYTES", 10**18)
    for name, look in (("disk", probes.disk_space), ("memory", probes.free_memory)):
        check = examine(name, look, "Free some.", core=False)
        assert (check.status, check.advice) == ("missing", "Free some.")


def test_dead_gradients_fail_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gradients" in probes.tiny_training_step()
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)
    with pytest.raises(ArithmeticError, match=r"\d+ of \d+ gradients are empty"):
        probes.tiny_training_step()


def test_the_probe_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    probes.tiny_training_step()
    assert torch.equal(torch.rand(1), wanted)


def test_no_token_is_shown(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise OSError(f"401 for Authorization: Bearer {TOKEN}")

    def lack() -> str:
        raise MissingError(f"{TOKEN} is not there")

    for look in (refuse, lack):
        assert TOKEN not in examine("Hub", look, "", core=False).detail
    monkeypatch.setattr(run_checks, "_core", list)
    monkeypatch.setattr(probes, "hub_answers", refuse)
    outcome = verb("doctor", "--online")
    assert outcome.code == 0, "the Hub is not core"
    assert "[token]" in outcome.out
    assert TOKEN not in outcome.out + outcome.err
