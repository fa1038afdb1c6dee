"""The tokenizer, the packing and the built folder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_ft.errors import UserError
from lola_ft.families import LOLA
from lola_ft.model import LolaForCausalLM
from lola_ft.nano import NanoSettings, build, build_nano
from lola_ft.nano.build import SPECIAL_TOKENS, train_tokenizer
from lola_ft.nano.pretrain import PretrainSettings, pack, pretrain, restarting_positions
from lola_ft.nano.settings import nano_architecture
from tests.nano.conftest import TINY, use_two_languages

pytestmark = pytest.mark.usefixtures("two_languages")
SCRIPTS = "Januari español Ελλάδα русский עברית العربية हिन्दी ไทย 日本語 한국어 አማርኛ ქართული ᏣᎳᎩ 🙂\t x  y\n\u200d"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_two_languages(patch)
        return build_nano(tmp_path_factory.mktemp("nano") / "base", TINY)


def test_special_ids_are_lolas(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 5)
    assert tokenizer.convert_ids_to_tokens(range(6)) == SPECIAL_TOKENS
    assert len(tokenizer) == TINY.vocab_size
    assert tokenizer("Januari")["input_ids"] == tokenizer("Januari", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [*SCRIPTS.split(" "), SCRIPTS, "", " leading", "e\u0301 is not é"])
def test_any_text_survives_the_tokenizer(base: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_positions_restart_after_each_end_of_text() -> None:
    rows = torch.tensor([[7, 8, 5, 9, 5, 5, 7, 7], [5, 7, 7, 7, 7, 7, 7, 5]])
    assert restarting_positions(rows, 5).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


def test_packing_loses_at_most_the_last_row() -> None:
    tokenizer = train_tokenizer(["one two three"], vocab_size=262, max_length=64)
    documents = ["one two", "three", "two one three"] * 5
    rows = pack(documents, tokenizer, row_length=8)
    whole = [id_ for text in documents for id_ in [*tokenizer(text)["input_ids"], 5]]
    assert rows.flatten().tolist() == whole[: len(whole) // 8 * 8]


def test_the_base_loads_as_lola_and_is_the_architecture(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    assert type(model) is LolaForCausalLM
    assert model.config.model_type == "lola_v1"
    keys = json.loads((base / "config.json").read_text())
    assert keys["architectures"] == ["LOLALMHeadModel"] or "Lola" in keys["architectures"][0]
    assert model.transformer.h[1].moe.experts.num_experts == 4
    assert (keys["eos_token_id"], keys["pad_token_id"], keys["bos_token_id"]) == (5, 1, 0)


def test_a_second_build_reuses_the_folder_and_another_setting_does_not(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = base / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert build_nano(base, TINY) == base
    assert weights.stat().st_mtime_ns == written
    assert "already" in capsys.readouterr().out
    changed = NanoSettings(**{**TINY.__dict__, "pretrain": PretrainSettings(steps=1, rows_per_step=2, row_length=64)})
    build_nano(base, changed)
    assert weights.stat().st_mtime_ns > written
    assert "already" not in capsys.readouterr().out


def test_two_builds_are_equal_bit_by_bit(tmp_path: Path) -> None:
    one, two = build_nano(tmp_path / "one", TINY), build_nano(tmp_path / "two", TINY)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no nano base"):
        build_nano(tmp_path, TINY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_nano(tmp_path / "base", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pretraining_lowers_the_loss(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = pack(["Kenya, Uganda na Tanzania"] * 200, tokenizer, row_length=64)
    model = build.new_model(nano_architecture(LOLA, TINY), TINY)
    loss = pretrain(model, rows, 5, PretrainSettings(steps=40, rows_per_step=2, row_length=64))
    assert loss < 1.0, "one sentence, over and over; ln(512) is 6.2"
