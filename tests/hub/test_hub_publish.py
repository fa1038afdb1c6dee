"""Publishing to the fake Hub: what arrives, byte by byte."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lola_ft.card import read_terms
from lola_ft.errors import PublishError
from lola_ft.hub.publish import publish
from lola_ft.merging import merge
from tests.card.test_terms import GATED, card_in
from tests.tiny import TINY

REPO = "tester/model"
ADAPTER_FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "prompt_template.jinja", "published.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}
RUN_FILES = ADAPTER_FILES | {"loss.png", "manifest.json", "metrics.jsonl", "recipe.yaml"}


def send(path: Path, **options: Any) -> None:
    """Publish without the check, which has tests of its own."""
    publish(path, REPO, **{"base_id": "tester/base", "skip_check": True, "wait": lambda _: None} | options)


def test_a_run_arrives_whole_and_as_it_is(hub: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    send(run)
    repo = hub.repos[REPO]
    assert repo.files.keys() == RUN_FILES | {".gitattributes"}
    for name in ("adapter_model.safetensors", "tokenizer.json", "prompt_template.jinja"):
        assert repo.files[name] == (run / "adapter" / name).read_bytes()
    for name in ("loss.png", "metrics.jsonl"):
        assert repo.files[name] == (run / name).read_bytes()
    assert len(repo.commits) == 2  # the one that made the repository, and ours
    assert hub.large.keys() == {hashlib.sha256(repo.files["adapter_model.safetensors"]).hexdigest()}
    out = capsys.readouterr().out
    assert f"Published: {hub.url}/{REPO} (public, commit {repo.head})" in out
    assert "NOT CHECKED" in out
    assert "Left out: checkpoints." in out


def test_nothing_sent_names_this_machine(hub: Any, run: Path, tmp_path: Path, tiny_base: Path) -> None:
    send(run)
    for name, content in hub.repos[REPO].files.items():
        for private in (str(tmp_path), str(tiny_base), str(Path.home()), "/tmp"):
            assert private.encode() not in content, name


def test_base_id_stands_in_config_recipe_manifest_and_card(hub: Any, run: Path) -> None:
    send(run)
    files = hub.repos[REPO].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    assert b"model: tester/base" in files["recipe.yaml"]
    assert json.loads(files["manifest.json"])["base"]["id"] == "tester/base"
    assert b"base_model: tester/base" in files["README.md"]


def test_a_new_repository_is_private_when_asked(hub: Any, adapter: Path) -> None:
    send(adapter, private=True)
    assert hub.repos[REPO].private


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Any, adapter: Path) -> None:
    hub.add(REPO, {}, private=False)
    with pytest.raises(PublishError, match="exists and is public"):
        send(adapter, private=True)
    assert len(hub.repos[REPO].commits) == 1


def test_publishing_again_updates_and_leaves_the_owners_files(hub: Any, adapter: Path, merged: Path) -> None:
    send(adapter)
    repo = hub.repos[REPO]
    repo.commit(repo.files | {"notes.md": b"the owner's", "adapter_old.txt": b"the owner's"}, "by hand")
    send(merged)
    assert "model.safetensors" in repo.files
    assert not {"adapter_config.json", "adapter_model.safetensors"} & repo.files.keys()
    assert repo.files["notes.md"] == repo.files["adapter_old.txt"] == b"the owner's"
    assert len(repo.commits) == 4


def test_publishing_the_same_again_makes_no_commit(hub: Any, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    send(adapter)
    send(adapter)
    assert len(hub.repos[REPO].commits) == 2
    assert capsys.readouterr().out.count("Published:") == 2


def test_the_other_layout_holds_the_same_numbers(hub: Any, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    from lola_ft.adapters.on_disk import read_adapter

    send(adapter, layout="per_expert", base=str(tiny_base))
    files = hub.repos[REPO].files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    sent, own = read_adapter(tmp_path), read_adapter(adapter)
    assert sent.layout == "per_expert"
    assert sent.config["base_model_name_or_path"] == "tester/base"
    expected = own.weights(TINY)
    assert sent.weights(TINY).pairs.keys() == expected.pairs.keys()
    for module, pair in sent.weights(TINY).pairs.items():
        assert torch.equal(pair.a, expected.pairs[module].a)
        assert torch.equal(pair.b, expected.pairs[module].b)
    card = files["README.md"].decode()
    assert "With stock PEFT:" not in card  # the native class does not read this layout
    assert "With stock PEFT, without lola_ft:" in card
    assert "tokenizer.json" in files


def test_merged_weights_arrive_with_config_and_report(hub: Any, merged: Path, tmp_path: Path) -> None:
    send(merged)
    files = hub.repos[REPO].files
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    sent, own = load_file(tmp_path / "model.safetensors"), load_file(merged / "model.safetensors")
    assert sent.keys() == own.keys()
    assert all(torch.equal(sent[name], own[name]) for name in own)
    assert {"config.json", "merge_report.json", "tokenizer.json"} <= files.keys()


def test_shards_of_an_earlier_publication_are_replaced(hub: Any, merged: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged)
    model.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    shutil.copy(merged / "merge_report.json", tmp_path / "shards")
    send(tmp_path / "shards")
    repo = hub.repos[REPO]
    shards = {name for name in repo.files if name.startswith("model-")}
    assert len(shards) > 1
    index = json.loads(repo.files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == shards
    send(merged)
    assert not (shards | {"model.safetensors.index.json"}) & repo.files.keys()
    assert repo.files["model.safetensors"] == (merged / "model.safetensors").read_bytes()


def test_pickles_checkpoints_and_strangers_are_left_out_and_named(
    hub: Any, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "training_args.bin").write_bytes(b"\x80\x02")
    (adapter / "notes.txt").write_text("mine")
    (adapter / "checkpoint-3").mkdir()
    send(adapter)
    assert hub.repos[REPO].files.keys() == ADAPTER_FILES | {".gitattributes"}
    assert "Left out: checkpoint-3, notes.txt, training_args.bin." in capsys.readouterr().out


def test_dry_run_shows_everything_and_asks_the_hub_nothing(
    hub: Any, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    send(run, dry_run=True)
    assert hub.requests == []
    out = capsys.readouterr().out
    assert all(name in out for name in RUN_FILES)
    assert "base_model: tester/base" in out
    assert "Published" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_id": None}, "its base is unknown, .*--base-id owner/name"),
        ({"base_id": "./base"}, "--base-id ./base: not the id of a repository"),
        ({"layout": "gguf"}, "--layout gguf: not known; use one of"),
        ({"base": "no/where/at/all"}, "no such folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(
    hub: Any, adapter: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(PublishError, match=said):
        send(adapter, **options)
    assert hub.requests == []


def test_a_base_that_is_a_local_folder_needs_an_id(hub: Any, run: Path, adapter: Path, tiny_base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny_base)}))
    for folder in (run, adapter):
        with pytest.raises(PublishError, match=r"its base is a local folder \(/.*\), so .*--base-id owner/name"):
            send(folder, base_id=None)
    assert hub.requests == []


def test_without_a_token_nothing_begins(hub: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="hf auth login"):
        send(adapter)
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="nothing to publish here"):
        send(tmp_path / "empty")
    with pytest.raises(PublishError, match="no such folder"):
        send(tmp_path / "nowhere")


@pytest.mark.usefixtures("hub")
def test_a_run_that_did_not_end_is_refused(run: Path) -> None:
    (run / "manifest.json").unlink()
    with pytest.raises(PublishError, match="has no adapter yet, so it is unfinished"):
        send(run)


def test_an_adapter_whose_base_is_not_here_is_not_sent_unchecked(
    hub: Any, adapter: Path, no_wait: Callable[[float], None]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "other/base"}))
    with pytest.raises(PublishError, match=r"base other/base .*--base.*--skip-check"):
        publish(adapter, REPO, wait=no_wait)
    assert hub.requests == []


def test_a_merge_keeps_licence_and_gate_and_publishing_warns_of_the_gate(
    hub: Any, tmp_path: Path, tiny_base: Path, tiny_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = card_in(Path(shutil.copytree(tiny_base, tmp_path / "gated")), GATED)
    (base / "LICENSE.txt").write_text("Do no harm.\n")
    merge(base, tiny_adapter, tmp_path / "merged", check="weights")
    assert (tmp_path / "merged" / "LICENSE.txt").read_text() == "Do no harm.\n"
    assert read_terms(tmp_path / "merged").name == "open-moe"
    shutil.rmtree(base)  # the merged folder is all that there is
    publish(tmp_path / "merged", "tester/model", base_id="org/base", skip_check=True, wait=lambda _: None)
    said = " ".join(capsys.readouterr().out.split())
    assert "The card of org/base names the licence open-moe" in said
    assert "Warning: org/base is gated" in said
    files = hub.repos["tester/model"].files
    assert files["LICENSE.txt"] == b"Do no harm.\n"
    assert b"license_name: open-moe" in files["README.md"]
    assert b"The base is gated" in files["README.md"]
