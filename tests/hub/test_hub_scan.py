"""Every kind of private thing, in every kind of file, is refused; what only looks so is not."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lola_ft.errors import PublishError
from lola_ft.hub.publish import publish
from lola_ft.hub.scan import Scanner

SECRET = "correct horse battery"


@pytest.fixture
def scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Kinds of what is found in a text under a file name."""
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-node-17")

    def run(text: str | bytes, name: str = "notes.json", own: Path | None = None) -> list[str]:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return [str(finding) for finding in Scanner([own] if own else []).scan(tmp_path / name)]

    return run


@pytest.mark.parametrize(
    "text",
    [
        '{"model": "/home/amina/lola"}',
        "model: /scratch/lola",
        "output: /data",
        "see /mnt/x for it",
        "[/work/a, b]",
        "path=/var/lib",
        "a: ~/models/lola",
        "~amina/models",
        "file:///srv/x",
        r'"C:\\Users\\amina\\x"',
        r"C:\Users\amina",
        "D:/models/lola",
        r'"\/home\/amina"',
    ],
)
def test_absolute_paths_are_found(scan: Callable[..., list[str]], text: str) -> None:
    assert scan(text) == ["notes.json:1: an absolute path of a machine"]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/dice-research/lola_v1",
        "[LOLA](https://arxiv.org/abs/2409.11272)",
        "base: dice-research/lola_v1",
        "yes/no, and / or, 1/2, </s>, km/h",
        "data/sw.jsonl and ./data/sw.jsonl and ../x/y",
        '"### Response:\\n"',
        '"Q: {{ q }}\\nA:"',
        "the 4-bit (NF4) base /",
        "[/INST]",
        '"MAX_TOKENS": 1024',
    ],
)
def test_what_only_looks_like_a_path_is_not(scan: Callable[..., list[str]], text: str) -> None:
    assert scan(text) == []


def test_compressed_bytes_that_look_like_a_path_are_none(scan: Callable[..., list[str]]) -> None:
    assert scan(b"\x89PNG\xff\x00 ,/uLtt4aaaxz/bgg77:x \x00", "loss.png") == []


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3" * 11,
        "ghp_" + "x1" * 18,
        "github_pat_" + "x1" * 20,
        "sk-" + "x1" * 12,
        "AKIA" + "A1" * 8,
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("name", ["card.md", "tokenizer.json", "loss.png"])
def test_tokens_are_found_everywhere(scan: Callable[..., list[str]], token: str, name: str) -> None:
    around = (b"\xff\x00", b"\x00") if name == "loss.png" else (b"one\nx ", b" y")
    found = scan(around[0] + token.encode() + around[1], name)
    assert [line.rpartition(": ")[2] for line in found] == ["a token or key"]
    assert token not in str(found)


@pytest.mark.parametrize("name", ["card.md", "vocab.json"])
def test_values_of_secret_variables_are_found_by_their_name(scan: Callable[..., list[str]], name: str) -> None:
    assert scan(f"a\nb {SECRET} c", name) == [f"{name}:2: the value of SOME_API_KEY"]


def test_a_secret_is_found_as_json_writes_it(scan: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", 'qu"ote\\slash')
    assert scan(json.dumps({"x": 'qu"ote\\slash'})) == ["notes.json:1: the value of DB_PASSWORD"]


def test_harmless_variables_are_not_looked_for(scan: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Amina of Mombasa")
    assert scan("false, by Amina of Mombasa") == []


def test_the_machines_name_is_found(scan: Callable[..., list[str]]) -> None:
    assert scan("ran on gpu-node-17.") == ["notes.json:1: this machine's name"]
    assert scan("ran on gpu-node-171 and my-gpu-node-17") == []


def test_a_vocabulary_may_hold_paths_but_not_this_machines(scan: Callable[..., list[str]], tmp_path: Path) -> None:
    assert scan('{"/usr/lib": 5, "/home/": 6}', "tokenizer.json") == []
    own = tmp_path / "models" / "lola"
    assert scan(json.dumps({"x": f"{own}/y"}), "tokenizer.json", own) == [
        "tokenizer.json:1: an absolute path of a machine"
    ]


def test_safetensors_metadata_is_read(scan: Callable[..., list[str]], adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights, adapter / "x.safetensors", metadata={"trained_on": "/home/amina/data", "note": SECRET})
    assert sorted(scan((adapter / "x.safetensors").read_bytes(), "x.safetensors")) == [
        "x.safetensors (metadata note): the value of SOME_API_KEY",
        "x.safetensors (metadata trained_on): an absolute path of a machine",
    ]


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [
        (
            "prompt_template.jinja",
            lambda text: text + "{# /home/amina/t #}",
            "prompt_template.jinja:2: an absolute path",
        ),
        (
            "tokenizer_config.json",
            lambda text: text.replace("{", '{"key": "hf_' + "a" * 34 + '",', 1),
            "a token or key",
        ),
    ],
)
def test_publishing_refuses_and_sends_nothing(
    hub: Any, adapter: Path, file: str, spoil: Callable[[str], str], said: str
) -> None:
    (adapter / file).write_text(spoil((adapter / file).read_text()))
    with pytest.raises(PublishError, match=said):
        publish(adapter, "tester/model", base_id="tester/base", skip_check=True)
    assert hub.requests == []


def test_publishing_refuses_metadata_of_weights(hub: Any, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "from": "/home/amina/run"})
    with pytest.raises(PublishError, match=r"adapter_model.safetensors \(metadata from\): an absolute path"):
        publish(adapter, "tester/model", base_id="tester/base", skip_check=True)
    assert hub.requests == []


def test_traces_that_libraries_leave_are_taken_out(hub: Any, adapter: Path) -> None:
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    traces = {"name_or_path": "/home/amina/base", "special_tokens_map_file": "/root/.cache/x.json"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | traces))
    publish(adapter, "tester/model", base_id="tester/base", skip_check=True)
    assert json.loads(hub.repos["tester/model"].files["tokenizer_config.json"]) == config
