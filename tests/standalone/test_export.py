"""`lola-ft export` and merged folders: their files, refused inputs, and the class that loads them."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import lola_ft
from lola_ft.errors import CheckpointError, UserError
from lola_ft.families import LOLA
from lola_ft.merging import merge
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.standalone.export import export
from lola_ft.standalone.portable_tokenizer import make_tokenizer_portable
from tests.conftest import Folder, assert_says

CODE = Path(lola_ft.__file__).parent / "standalone"
FILES = ["configuration_lola.py", "modeling_lola.py"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_the_code_imports_only_torch_and_transformers(name: str) -> None:
    tree = ast.parse((CODE / name).read_text())
    packages = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    packages |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {package.partition(".")[0] for package in packages} <= {
        "__future__", "functools", "typing", "torch", "transformers",
    }  # fmt: skip
    beside = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert beside <= {"configuration_lola"}


def test_every_class_that_the_family_names_is_in_the_code() -> None:
    for auto_class, code in LOLA.auto_map.items():
        module, _, name = code.partition(".")
        assert f"\nclass {name}(" in (CODE / f"{module}.py").read_text(), auto_class
    assert LOLA.hub_class in {code.partition(".")[2] for code in LOLA.auto_map.values()}


def test_a_merged_folder_carries_the_code(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", check=False)
    for name in FILES:
        assert (tmp_path / "merged" / name).read_bytes() == (CODE / name).read_bytes()
    config = config_of(tmp_path / "merged")
    assert config["auto_map"] == dict(LOLA.auto_map)
    assert config["architectures"] == ["LolaForCausalLM"]


def test_with_lola_ft_the_native_class_is_used(golden_export: Path) -> None:
    for trust in (True, False, None):
        model = AutoModelForCausalLM.from_pretrained(golden_export, trust_remote_code=trust)
        assert type(model) is LolaForCausalLM
        assert type(model.config) is LolaConfig


def test_what_the_native_class_saves_names_no_code_that_is_not_there(golden_export: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(golden_export).save_pretrained(tmp_path)
    assert "auto_map" not in config_of(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LolaForCausalLM


def test_export_links_the_weights_of_every_shard(folder: Folder, tmp_path: Path, verb: Callable[..., Any]) -> None:
    tensors = folder.tensors
    shards = folder.shard(3)
    done = verb("export", str(folder.path), "--out", str(tmp_path / "lola"))
    assert (done.code, done.err) == (0, "")
    assert "Weight files: 3 linked." in done.out
    for shard in shards:
        assert shard.samefile(tmp_path / "lola" / shard.name)
    before = config_of(folder.path)
    assert config_of(tmp_path / "lola") == before | {
        "auto_map": dict(LOLA.auto_map),
        "architectures": ["LolaForCausalLM"],
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "lola")
    assert torch.equal(again.transformer.wte.weight, tensors["transformer.wte.weight"])


def test_export_copies_onto_another_disk(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[..., Any]
) -> None:
    def other_disk(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    done = verb("export", str(folder.path), "--out", str(tmp_path / "lola"))
    assert "Weight files: 1 copied." in done.out
    assert not folder.weights_file.samefile(tmp_path / "lola" / "model.safetensors")
    assert (tmp_path / "lola" / "model.safetensors").read_bytes() == folder.weights_file.read_bytes()


def test_a_merged_model_is_exported_whole(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    """The model is one that an earlier version merged: without code, and with a config that names the authors' code."""
    merge(tiny_base, tiny_adapter, tmp_path / "merged", check=False)
    for name in FILES:
        (tmp_path / "merged" / name).unlink()
    old = config_of(tmp_path / "merged") | {"auto_map": {"AutoModel": "some/base--modeling_lola_gpt2.LOLAModel"}}
    (tmp_path / "merged" / "config.json").write_text(json.dumps(old | {"architectures": ["LOLALMHeadModel"]}))
    export(tmp_path / "merged", tmp_path / "lola")
    names = {file.name for file in (tmp_path / "lola").iterdir()}
    assert names == {file.name for file in (tmp_path / "merged").iterdir()} | set(FILES)
    assert config_of(tmp_path / "lola")["auto_map"] == dict(LOLA.auto_map)


def test_other_code_is_kept_and_reported(folder: Folder, tmp_path: Path, verb: Callable[..., Any]) -> None:
    theirs = {
        "AutoModelForCausalLM": "modeling_lola_gpt2.LOLALMHeadModel",
        "AutoModelForTokenClassification": "modeling_lola_gpt2.LOLAForTokenClassification",
    }
    folder.set_config(auto_map=theirs)
    (folder.path / "modeling_lola_gpt2.py").write_text("# theirs\n")
    done = verb("export", str(folder.path), "--out", str(tmp_path / "lola"))
    assert "Kept modeling_lola_gpt2.py; config.json now names lola_ft's code." in done.out
    assert (tmp_path / "lola" / "modeling_lola_gpt2.py").read_text() == "# theirs\n"
    assert config_of(tmp_path / "lola")["auto_map"] == theirs | dict(LOLA.auto_map)
    # An export of the export finds no other code and writes the same.
    export(tmp_path / "lola", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "lola")


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "topk is 2": {"topk": 2},
    "activation_function is 'relu'": {"activation_function": "relu"},
    "tie_word_embeddings is false": {"tie_word_embeddings": False},
    "reorder_and_upcast_attn": {"reorder_and_upcast_attn": True},
    "n_embd 64 is not a multiple of n_head 5": {"n_head": 5},
}


@pytest.mark.parametrize("expected", UNSUPPORTED)
def test_unsupported_settings_are_refused_when_exporting(
    expected: str, folder: Folder, tmp_path: Path, verb: Callable[..., Any]
) -> None:
    folder.set_config(**UNSUPPORTED[expected])
    done = verb("export", str(folder.path), "--out", str(tmp_path / "lola"))
    assert (done.code, done.out) == (2, "")
    assert_says(done.err, f"config.json … {expected}")
    assert not (tmp_path / "lola").exists()


@pytest.mark.parametrize("expected", UNSUPPORTED)
def test_unsupported_settings_are_refused_when_loading(expected: str, golden_export: Path, tmp_path: Path) -> None:
    """The config class beside the weights refuses them, because a config may be changed after it was written."""
    own = get_class_from_dynamic_module(LOLA.auto_map["AutoConfig"], golden_export)
    assert own is not LolaConfig
    (tmp_path / "config.json").write_text(json.dumps(config_of(golden_export) | UNSUPPORTED[expected]))
    with pytest.raises(ValueError, match=r"^config\.json: ") as refusal:
        own.from_pretrained(tmp_path)
    assert_says(str(refusal.value), expected)
    assert own.from_pretrained(golden_export).n_embd == 64


def test_an_untied_head_is_refused(folder: Folder, tmp_path: Path) -> None:
    tensors = folder.tensors
    folder.set_tensors(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from 'transformer\.wte\.weight'"):
        export(folder.path, tmp_path / "lola")


def test_a_folder_in_use_an_adapter_and_another_family_are_refused(
    folder: Folder, tiny_adapter: Path, tmp_path: Path, dense_gpt2: Path, verb: Callable[..., Any]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match=r"full: exists and is not empty\. Choose another --out"):
        export(folder.path, tmp_path / "full")
    with pytest.raises(UserError, match=r"is a run or an adapter.*Merge it first"):
        export(tiny_adapter, tmp_path / "lola")
    with pytest.raises(UserError, match=r"transformers has its own class for GPT-2 models.*Use it directly"):
        export(dense_gpt2, tmp_path / "lola")
    done = verb("export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "lola"))
    assert done.code == 2
    assert_says(done.err, "nowhere: no such folder")
    assert not (tmp_path / "lola").exists()


@pytest.fixture
def dense_gpt2(tmp_path: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    return tmp_path / "gpt2"


def test_a_portable_tokenizer_gives_the_same_ids(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    make_tokenizer_portable(tmp_path)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Jina langu ni <turn> Amina"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_ids == tokenizer.all_special_ids
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == config_of(tmp_path)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<turn>"]
    assert all(isinstance(m, str) for m in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"])
    make_tokenizer_portable(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first


def test_merges_that_the_earlier_form_cannot_express_stay(tmp_path: Path) -> None:
    content = {"model": {"merges": [["a", "b"], ["c d", "e"]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    make_tokenizer_portable(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == content


@pytest.mark.slow
def test_weights_saved_from_the_backbone_alone_load(
    golden_base: Path, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    shutil.copytree(golden_base, tmp_path / "base")
    tensors = load_file(golden_base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    export(tmp_path / "base", tmp_path / "lola")
    code = """
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("lola", trust_remote_code=True)
stored = load_file("lola/model.safetensors")
state = model.transformer.state_dict()
print(state.keys() == stored.keys() and all((state[name] == stored[name]).all() for name in stored))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
