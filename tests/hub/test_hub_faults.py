"""The Hub fails in every way it can: what is retried, what is refused, and that half is never called done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.errors import PublishError
from lola_ft.hub.publish import publish
from lola_ft.hub.retry import WAITS

REPO = "tester/model"
CREATE, INFO, COMMIT = r"repos/create$", r"api/models/tester/model$", r"/commit/main$"
PREUPLOAD, BATCH, STORAGE, YAML = r"/preupload/main$", r"objects/batch$", r"^/storage/", r"validate-yaml$"


@pytest.fixture
def send(adapter: Path) -> Callable[..., list[float]]:
    """Publish; gives the seconds that were waited between tries."""

    def run(**options: Any) -> list[float]:
        waited: list[float] = []
        publish(adapter, REPO, base_id="tester/base", skip_check=True, wait=waited.append, **options)
        return waited

    return run


def arrived(hub: Any) -> bool:
    return REPO in hub.repos and "adapter_model.safetensors" in hub.repos[REPO].files


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        ("POST", CREATE, "drop"),
        ("POST", CREATE, "drop after"),
        ("POST", CREATE, 500),
        ("GET", INFO, 503),
        ("POST", PREUPLOAD, 500),
        ("POST", BATCH, "drop"),
        ("PUT", STORAGE, 500),
        ("PUT", STORAGE, "drop"),
        ("POST", r"objects/verify$", 500),
        ("POST", YAML, "drop"),
        ("POST", COMMIT, 500),
        ("POST", COMMIT, "drop"),
        ("POST", COMMIT, "drop after"),
        ("POST", COMMIT, 429),
        ("POST", COMMIT, 412),
        ("POST", COMMIT, 409),
    ],
)
def test_a_passing_fault_is_tried_again(
    hub: Any, send: Callable[..., list[float]], make_fault: Callable[..., Any], method: str, path: str, answer: Any
) -> None:
    hub.faults.append(make_fault(path, answer, method=method))
    waited = send()
    assert hub.faults[0].times == 0, "the fault did not happen"
    assert waited in ([], [WAITS[0]])  # the client repeats some requests by itself
    assert arrived(hub)
    assert len(hub.repos[REPO].commits) == 2  # also when the answer to the commit got lost


@pytest.mark.parametrize("times", [1, 1000])
def test_a_broken_verification_is_tried_again_and_then_an_error(
    hub: Any,
    send: Callable[..., list[float]],
    make_fault: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: int,
) -> None:
    repo = hub.add(REPO, {})
    commit = type(repo).commit

    def then_break(*given: Any) -> str:
        hub.faults.append(make_fault(INFO, 502, method="GET", times=times))
        return commit(*given)

    monkeypatch.setattr(type(repo), "commit", then_break)
    if times == 1:
        assert send() == [WAITS[0]]
        assert "Published:" in capsys.readouterr().out
    else:
        with pytest.raises(PublishError, match="refused with 502"):
            send()
        assert "Published" not in capsys.readouterr().out
    assert len(repo.commits) == 2


@pytest.mark.parametrize("path", [CREATE, PREUPLOAD, BATCH, COMMIT])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (401, "hf auth login"),
        (403, "may not write there"),
        (500, "refused with 500"),
        ("drop", "the connection dropped"),
    ],
)
def test_a_lasting_fault_is_an_error_and_nothing_is_sent(
    hub: Any,
    send: Callable[..., list[float]],
    make_fault: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    path: str,
    answer: Any,
    said: str,
) -> None:
    hub.faults.append(make_fault(path, answer, times=1000))
    with pytest.raises(PublishError, match=said):
        send()
    assert not arrived(hub)
    assert "Published" not in capsys.readouterr().out


def test_a_conflict_that_stays_is_an_error(
    hub: Any, send: Callable[..., list[float]], make_fault: Callable[..., Any]
) -> None:
    hub.faults.append(make_fault(COMMIT, 409, times=1000))
    with pytest.raises(PublishError, match="is being changed by someone else"):
        send()
    assert not arrived(hub)


def test_an_existing_repository_answers_409_and_is_used(hub: Any, send: Callable[..., list[float]]) -> None:
    hub.add(REPO, {"notes.md": b"mine"})
    send()
    assert arrived(hub)
    assert hub.repos[REPO].files["notes.md"] == b"mine"


def test_a_refusal_is_not_repeated(hub: Any, send: Callable[..., list[float]], make_fault: Callable[..., Any]) -> None:
    hub.faults.append(make_fault(COMMIT, 403, times=1000))
    with pytest.raises(PublishError):
        send()
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_a_wrong_token_and_a_strangers_repository_are_refused(
    hub: Any, send: Callable[..., list[float]], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PublishError, match=r"may not write there \(403\).*write access to 'somebody'"):
        publish(adapter, "somebody/model", base_id="tester/base", skip_check=True, wait=lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "W" * 34)
    with pytest.raises(PublishError, match="does not accept your token") as caught:
        send()
    assert "WWW" not in str(caught.value)
    assert hub.repos == {}


def test_a_file_that_got_lost_on_the_hub_is_found_out(
    hub: Any, send: Callable[..., list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.lose = {"adapter_config.json"}
    with pytest.raises(PublishError, match=r"does not hold what was sent: adapter_config\.json"):
        send()
    assert "Published" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_file_that_changed_on_the_hub_is_found_out(
    hub: Any, send: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    repo = hub.add(REPO, {})
    commit = type(repo).commit

    def corrupt(self: Any, files: dict[str, bytes], message: str) -> str:
        return commit(self, files | {name: files[name][:-1] + b"?"}, message)

    monkeypatch.setattr(type(repo), "commit", corrupt)
    with pytest.raises(PublishError, match=f"does not hold what was sent: {name}"):
        send()


def test_somebody_elses_commit_in_between_is_found_out(
    hub: Any, send: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.add(REPO, {})
    commit = type(repo).commit

    def then_another(self: Any, files: dict[str, bytes], message: str) -> str:
        ours = commit(self, files, message)
        commit(self, files | {"theirs.txt": b""}, "theirs")
        return ours

    monkeypatch.setattr(type(repo), "commit", then_another)
    with pytest.raises(PublishError, match="so someone else changed it"):
        send()
