"""The merged folder: complete, in the base's own form, and present only if the merge was right."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_ft.adapters import AdapterSettings, add_adapter, load_adapter, save_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.safetensors_writer import SafetensorsWriter
from lola_ft.errors import AdapterError, CheckpointError, UserError, WriteError
from lola_ft.families import LOLA
from lola_ft.merging import merge
from lola_ft.merging.deltas import Deltas
from lola_ft.merging.outputs import Models
from lola_ft.merging.verify import compare
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.quantization import load_base

# Float32: one merged weight against base and side path.
ROUNDING = 1e-5
# Keys of a merged folder's config about its code and tokenizer.
OURS = {
    "architectures": ["LolaForCausalLM"],
    "auto_map": dict(LOLA.auto_map),
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is in it


def test_a_merged_folder_loads_like_any_checkpoint(tiny_base: Path, adapter: Path, ids: Tensor, tmp_path: Path) -> None:
    merge(tiny_base, adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model) is LolaForCausalLM
    expected = load_adapter(load_base(tiny_base, None, "float32", quiet=True), adapter)(ids).logits
    assert_close(model.eval()(ids).logits, expected, atol=ROUNDING, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "Jina langu ni Amina"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(tiny_base)(text)["input_ids"]
    assert names(tmp_path / "merged") == sorted(
        {*names(tiny_base), "merge_report.json", "README.md", "configuration_lola.py", "modeling_lola.py"}
    )


def test_the_report_is_what_the_call_returns(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(tiny_base, adapter, tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert stored == json.loads(json.dumps(asdict(report)))
    assert stored.keys() >= {"base_fingerprint", "applied", "adapter_tensors", "changed", "copied", "dropped"}
    assert stored["dtype"] == "auto"
    assert stored["rounding"] == "base"
    proof = stored["verification"]
    assert proof.keys() == {"max_logit_difference", "largest_logit", "top1_agreement", "tokens", "compared", "dtype"}
    assert proof["tokens"] == proof["compared"] > 60
    assert proof["dtype"] == "float32"
    assert 0 <= proof["max_logit_difference"] < ROUNDING < proof["largest_logit"]


def test_the_config_keeps_every_key(
    golden_folder: Path, copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_lola_gpt2.LOLALMHeadModel"}
    keys = json.loads((golden_folder / "base" / "config.json").read_text())
    extra = {key: keys[key] for key in keys if key.startswith(("summary", "transformers", "topk"))}
    base = copy_base("base", auto_map=auto_map, made_by="someone", **extra)
    (base / "modeling_lola_gpt2.py").write_text("# remote code\n")
    merge(base, adapter, tmp_path / "merged", check=False)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged"))
    # New keys: lola_ft's code and class, the tokenizer's class, and the older key of the dtype.
    assert after == before | OURS | {"torch_dtype": "float32"}
    assert (tmp_path / "merged" / "modeling_lola_gpt2.py").read_text() == "# remote code\n"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_dtype_that_was_written(
    key: str, copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = copy_base("base")
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config | {key: "float32"}))
    merge(base, adapter, tmp_path / "merged", dtype="bfloat16", check=False)
    written = {"torch_dtype": "bfloat16", key: "bfloat16"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config | OURS | written


def test_a_sharded_base_stays_sharded(
    shard: Callable[[str], Path], adapter: Path, tmp_path: Path, read_state: Callable[[Path], dict[str, Tensor]]
) -> None:
    base = shard("150KB")
    merge(base, adapter, tmp_path / "merged", check="weights")
    shards = [name for name in names(base) if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert [name for name in names(tmp_path / "merged") if name.endswith(".safetensors")] == shards
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    for name in shards:
        held = load_file(tmp_path / "merged" / name)
        assert held.keys() == load_file(base / name).keys()
        assert held.keys() == {key for key, file in index["weight_map"].items() if file == name}
    merged = read_state(tmp_path / "merged")
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in merged.values())


def test_one_shard_with_an_index_is_merged(copy_base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = copy_base("base")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    keys = load_file(base / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(base, adapter, tmp_path / "merged", check="weights")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_legacy_tensors_are_left_out_and_listed(
    copy_base: Callable[..., Path], adapter: Path, tmp_path: Path, tiny_base: Path
) -> None:
    base = copy_base("base")
    state = load_file(base / "model.safetensors")
    legacy = {
        "lm_head.weight": state["transformer.wte.weight"].clone(),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(state | legacy, base / "model.safetensors", metadata={"format": "pt"})
    report = merge(base, adapter, tmp_path / "merged", check="weights")
    assert report.dropped == sorted(legacy)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == state.keys()
    assert report.base_fingerprint == merge(tiny_base, adapter, tmp_path / "again", check=False).base_fingerprint


# The tokenizer


def test_the_adapter_s_tokenizer_is_preferred_and_never_mixed_with_the_base_s(
    tiny_base: Path, copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = copy_base("base")
    (base / "added_tokens.json").write_text("{}")
    (base / "chat_template.jinja").write_text("the base's")
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<|answer|>"])
    tokenizer.save_pretrained(adapter)
    merge(base, adapter, tmp_path / "merged", check=False)
    merged = tmp_path / "merged"
    written = AutoTokenizer.from_pretrained(merged)
    assert written.convert_tokens_to_ids("<|answer|>") == len(tokenizer) - 1
    assert written.get_vocab() == tokenizer.get_vocab()
    assert {file.name for file in adapter.glob("tokenizer*")} == {file.name for file in merged.glob("tokenizer*")}
    assert not {"added_tokens.json", "chat_template.jinja"} & set(names(merged))
    assert (merged / "generation_config.json").read_text() == '{"eos_token_id": 5}'


def test_without_its_own_tokenizer_the_bases_is_copied_as_a_whole(
    copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    base = copy_base("base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "README.md").write_text("a card")
    merge(base, adapter, tmp_path / "merged", check=False)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "merged"))
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template == "{{ messages }}"
    assert "a card" not in (tmp_path / "merged" / "README.md").read_text()


def test_a_base_without_a_tokenizer_is_compared_on_plain_ids(golden_folder: Path, tmp_path: Path) -> None:
    report = merge(golden_folder / "base", golden_folder / "adapter", tmp_path / "merged")
    assert report.verification is not None
    assert report.verification.tokens == 96


# Files that a merge does not change


def test_base_and_adapter_do_not_change(copy_base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = copy_base("base")
    before = snapshot(base), snapshot(adapter)
    for folder in (base, adapter):
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
    merge(base, adapter, tmp_path / "merged", check="weights")
    assert (snapshot(base), snapshot(adapter)) == before
    # The sources are read-only, and the result is not.
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "merged").iterdir())
    for folder in (base, adapter):
        folder.chmod(0o755)


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_folder_in_use_is_refused(taken: str, tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / taken
    if taken == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(UserError, match=f"{taken}: exists and is not empty"):
        merge(tiny_base, adapter, out)
    assert (out.read_text() if out.is_file() else (out / "mine").read_text()) == "mine"


def test_an_empty_folder_is_no_obstacle(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge(tiny_base, adapter, tmp_path / "merged", check=False)
    assert "config.json" in names(tmp_path / "merged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not known; use auto or one of bfloat16, float16, float32"),
        ({"rounding": "fp4"}, "rounding 'fp4' is not known; use one of base, nf4"),
    ],
)
def test_an_unknown_option_is_refused(
    options: dict[str, str], message: str, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        merge(tiny_base, adapter, tmp_path / "merged", **options)
    assert names(tmp_path) == ["adapter"]


# Whole or not at all


def test_a_failure_while_writing_leaves_nothing(
    tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = SafetensorsWriter.write_piece, []

    def fill_the_disk(writer: SafetensorsWriter, tensor: Tensor) -> None:
        if len(written) == 20:
            raise OSError(28, "No space left on device")
        written.append(tensor)
        write(writer, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write_piece", fill_the_disk)
    with pytest.raises(WriteError, match="No space left"):
        merge(tiny_base, adapter, tmp_path / "merged")
    assert len(written) == 20
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [AdapterError("the logits differ"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_comparison_leaves_nothing(
    error: BaseException, tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        (partial,) = tmp_path.glob(".merged.partial")
        assert (partial / "model.safetensors").is_file()
        raise error

    monkeypatch.setattr(import_module("lola_ft.merging.models"), "compare", fail)
    with pytest.raises(type(error)):
        merge(tiny_base, adapter, tmp_path / "merged")
    assert names(tmp_path) == ["adapter"]


def test_an_adapter_tensor_left_out_is_found_by_counting(
    tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Deltas.tensors_for

    def forgetful(self: Deltas, name: str) -> list[str]:
        return [] if name.endswith("h.3.moe.experts.2.c_proj.weight") else right(self, name)

    monkeypatch.setattr(Deltas, "tensors_for", forgetful)
    with pytest.raises(AdapterError, match="56 of 58 adapter tensors were merged"):
        merge(tiny_base, adapter, tmp_path / "merged", check=False)
    assert names(tmp_path) == ["adapter"]


def test_a_wrong_merge_is_found_by_its_logits(
    tiny_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each expert gets its neighbour's update, all shapes and counts are right."""
    right = Deltas._read_pair

    def wrong(self: Deltas, module: str) -> Any:
        return right(self, module.replace(".experts.0.", ".experts.1."))

    monkeypatch.setattr(Deltas, "_read_pair", wrong)
    monkeypatch.setattr(import_module("lola_ft.merging.merge"), "prove", lambda *_: None)
    with pytest.raises(AdapterError, match=r"differ .*float32"):
        merge(tiny_base, adapter, tmp_path / "merged")
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize(
    ("damage", "dtype"),
    [
        ("the base itself", "float32"),
        ("one NaN", "bfloat16"),
        ("one expert of another", "float32"),
        ("one expert of another", "bfloat16"),
        ("one expert of another", "float16"),
        ("a router too sharp", "bfloat16"),
    ],
)
def test_the_comparison_finds_damage(
    damage: str, dtype: str, copy_base: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    merged, base = tmp_path / "merged", copy_base("base", getattr(torch, dtype))
    merge(base, adapter, merged, check=False)
    state = load_file(merged / "model.safetensors")
    if damage == "the base itself":
        shutil.copyfile(base / "model.safetensors", merged / "model.safetensors")
    else:
        if damage == "a router too sharp":  # chooses the same experts; the logits stay within 16-bit rounding
            state["transformer.h.3.moe.gate.weight"] *= 1.2
        elif damage == "one NaN":
            state["transformer.h.3.moe.experts.1.c_fc.weight"][0, 0] = float("nan")
        else:
            one, other = (f"transformer.h.3.moe.experts.{e}.c_proj.weight" for e in (1, 2))
            state[one], state[other] = state[other], state[one]
        save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    what = "router scores" if "router" in damage else ""
    models = Models(base, adapter, merged, torch.float32)
    reference, result = models.adapted(None), models.merged_alone()
    with pytest.raises(AdapterError, match=rf"{what} differ .*{dtype}"):
        compare(reference, result, getattr(torch, dtype))


@pytest.mark.slow
def test_a_token_that_rounding_sends_to_another_expert_is_no_error(tmp_path: Path) -> None:
    """With 6 MoE layers and random routers, rounding to bfloat16 changes a few of about 600 choices."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_positions": 64, "n_embd": 64, "n_layer": 12, "n_head": 4, "num_experts": 8}
    model = LolaForCausalLM(LolaConfig(**sizes, n_inner=128, initializer_range=0.1))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    ranks = AdapterSettings(attention_rank=4, mlp_rank=4, expert_rank=4)
    adapted = add_adapter(load_base(tmp_path / "base", None, "float32", quiet=True), ranks)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    proof = merge(tmp_path / "base", save_adapter(adapted, tmp_path / "adapter"), tmp_path / "merged").verification
    assert proof is not None
    assert 40 < proof.compared < proof.tokens == 96
    # A third of the tolerance. The tokens that are left out differ by up to 0.3.
    assert proof.max_logit_difference < 0.035 * proof.largest_logit


def test_an_untied_head_is_not_dropped_silently(copy_base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    """The merge refuses it without the comparison of logits, which would find it when it loads the base."""
    base = copy_base("untied")
    state = load_file(base / "model.safetensors")
    head = {"lm_head.weight": state["transformer.wte.weight"] + 1}
    save_file(state | head, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' .*'transformer\.wte\.weight'"):
        merge(base, adapter, tmp_path / "merged", check="none")
    assert not (tmp_path / "merged").exists()


def test_an_output_path_inside_a_file_is_a_user_error(copy_base: Callable[..., Path], adapter: Path) -> None:
    base = copy_base("base")
    with pytest.raises(
        UserError, match=r"config\.json/merged: cannot be written, because .*config\.json is not a folder"
    ):
        merge(base, adapter, base / "config.json" / "merged", check="none")


def test_a_merge_is_a_base_like_any_other(tiny_base: Path, adapter: Path, tmp_path: Path, ids: Tensor) -> None:
    """A merged model has its own fingerprint, loads in 4 bit, and takes the next adapter."""
    merge(tiny_base, adapter, tmp_path / "merged", check="weights")
    assert BaseCheckpoint.open(tmp_path / "merged").ignored == []
    model = load_base(tmp_path / "merged", "nf4", "float32", quiet=True)
    assert model.base_fingerprint != load_base(tiny_base, None, "float32", quiet=True).base_fingerprint
    before = model(ids).logits
    assert (load_adapter(model, adapter, allow_other_base=True)(ids).logits - before).abs().max() > 0.01
