"""Models of other architectures beside LOLA: found without loading, asked by the harness, never code or pickles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MT5Config, MT5ForConditionalGeneration, PreTrainedModel

from lola_ft.errors import CheckpointError
from lola_ft.evaluation.suite.other_model import OtherModel, find_other_model
from tests.conftest import Outcome, write_rows

Verb = Callable[..., Outcome]
TASKS = Path(__file__).parents[2] / "data" / "harness"
MARKS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 5}


def saved(model: PreTrainedModel, folder: Path, base: Path) -> Path:
    """Save a model with the tokenizer of the tiny base."""
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def mt5(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = json.loads((tiny_base / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = MT5ForConditionalGeneration(MT5Config(vocab_size=vocab, decoder_start_token_id=1, **sizes, **MARKS))
    return saved(model, tmp_path_factory.mktemp("other") / "mt5", tiny_base)


@pytest.fixture(scope="module")
def neox(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = json.loads((tiny_base / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=vocab, max_position_embeddings=128, **sizes, **MARKS)
    return saved(GPTNeoXForCausalLM(config), tmp_path_factory.mktemp("other") / "neox", tiny_base)


def test_other_architectures_are_told_from_our_own(mt5: Path, neox: Path, tiny_base: Path, tiny_adapter: Path) -> None:
    assert find_other_model(str(mt5)) == OtherModel(str(mt5), mt5, "mt5", encodes=True)
    assert find_other_model(str(neox)) == OtherModel(str(neox), neox, "gpt_neox", encodes=False)
    assert find_other_model(str(tiny_base)) is None
    assert find_other_model(str(tiny_adapter)) is None


def test_code_and_pickles_are_refused(neox: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(neox, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Pickled weights are never loaded"):
        find_other_model(str(pickled))
    own_code = tmp_path / "own"
    own_code.mkdir()
    (own_code / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "code.Mine"}}))
    with pytest.raises(
        CheckpointError, match=r"no language model of this type.* Its own code \(auto_map\) is never run"
    ):
        find_other_model(str(own_code))


def test_rows_and_4_bit_are_refused_for_other_architectures(verb: Verb, mt5: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "one two"}])
    of_rows = verb("evaluate", mt5, "--data", file, "--format", "text")
    assert of_rows.code == 2
    assert "is an encoder-decoder" in of_rows.err
    assert "--suite lola-paper" in of_rows.err
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    options = ("--include-path", TASKS, "--tasks", "lola_ft_colours", "--out", tmp_path / "out")
    four_bit = verb("evaluate", mt5, "--suite", "lola-paper", *options, "--quantization", "nf4")
    assert four_bit.code == 2
    assert "mt5 is not one" in four_bit.err


@pytest.mark.slow
def test_other_architectures_are_measured_beside_lola(
    verb: Verb, tiny_base: Path, mt5: Path, neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    (tasks / "texts.yaml").write_text(
        "task: lola_ft_texts\noutput_type: loglikelihood_rolling\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {{test: {write_rows(tmp_path / 'texts.jsonl', [{'text': 'one two three'}])}}}\n"
        "test_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: bits_per_byte\n"
    )
    options = ("--suite", "lola-paper", "--include-path", tasks, "--out", tmp_path / "out")
    models = (neox, tiny_base, mt5)
    colours = verb("evaluate", *models, *options, "--tasks", "lola_ft_colours")
    assert colours.code == 0, colours.err
    report = json.loads((tmp_path / "out/lola-paper.json").read_text())
    assert [model["kind"] for model in report["models"]] == ["gpt_neox", "base", "mt5"]
    found = {name: result["lola_ft_colours"] for name, result in report["results"].items()}
    assert list(found) == [str(model) for model in models]
    assert {result["documents"] for result in found.values()} == {4}
    again = verb("evaluate", mt5, *options, "--tasks", "lola_ft_colours")
    assert "lola_ft_colours: already evaluated, so the result is read from" in again.out.replace("\n", " ")
    texts = verb("evaluate", *models, *options, "--tasks", "lola_ft_texts")
    assert texts.code == 2
    assert "1 tasks failed" in texts.err, "the causal models have a perplexity"
    assert "not defined for an encoder-decoder" in texts.err
