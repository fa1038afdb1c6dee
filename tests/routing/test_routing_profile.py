"""Profiles: exactly the real tokens' choices, each once, of every kind of model; the file keeps all of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import lola_ft
from lola_ft.errors import DataError, UserError
from lola_ft.open_model import open_model
from lola_ft.routing import profiling
from lola_ft.routing.language_families import unknown_languages
from lola_ft.routing.profile import Profile, read_profile, save_profile
from lola_ft.routing.profiling import profile_routing
from lola_ft.routing.texts import Texts, sources_of
from tests.conftest import make_base
from tests.routing.conftest import TEXTS


def one_by_one(model: Any, tokenizer: Any, text: str, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices (T, M) and probabilities (T, M, E) of each paragraph alone, piece by piece, through the whole model."""
    chosen, probs = [], []
    for paragraph in text.split("\n\n"):
        ids = tokenizer(paragraph.strip("\n"), add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), max_length):
            piece = torch.tensor([ids[start : start + max_length]])
            with torch.no_grad():
                logits = model(piece, output_router_logits=True).router_logits
            probs.append(torch.stack(logits, dim=1).softmax(-1))
            chosen.append(probs[-1].argmax(-1))
    return torch.cat(chosen), torch.cat(probs)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [128, 37])
def test_counts_are_those_of_each_text_alone(
    max_length: int, tiny_base: Path, tiny_adapter: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batching, padding, windows and the adapter's wrappers change nothing; no token is left out or counted twice."""
    monkeypatch.setattr(profiling, "_BATCH_TOKENS", 160)
    monkeypatch.setattr(profiling, "_WINDOW_TOKENS", 150)
    found = profile_routing(
        tiny_adapter, [texts], base=str(tiny_base), quantization=None, max_length=max_length, sample=30, device="cpu"
    )
    opened = open_model(tiny_adapter, base=str(tiny_base), quantization=None, device="cpu")
    assert found.languages == ("de", "en", "sw")
    for place, language in enumerate(found.languages):
        chosen_TM, probs_TME = one_by_one(opened.model, opened.tokenizer, TEXTS[language], max_length)
        counts = torch.stack([chosen_TM[:, m].bincount(minlength=4) for m in range(2)])
        assert found.counts_LME[place].equal(counts)
        assert found.tokens_L[place] == len(chosen_TM)
        torch.testing.assert_close(found.mean_probs_LME[place], probs_TME.mean(0))
        gates = probs_TME * torch.nn.functional.one_hot(chosen_TM, 4)
        torch.testing.assert_close(found.mean_gates_LME[place], gates.mean(0))
        assert found.choices(language).equal(chosen_TM[:30].to(torch.uint8))
    assert found.about.layers == (1, 3)
    assert found.about.kind == "adapter"


def test_documents_bytes_and_tokens_are_those_of_the_text(profile: Profile, tiny_base: Path) -> None:
    tokenizer = open_model(tiny_base, quantization=None, device="cpu").tokenizer
    for place, language in enumerate(profile.languages):
        paragraphs = [text.strip("\n") for text in TEXTS[language].split("\n\n")]
        assert profile.documents_L[place] == len(paragraphs)
        assert profile.bytes_L[place] == sum(len(text.encode()) for text in paragraphs)
        ids = [i for text in paragraphs for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        start = profile.token_kinds_L[:place].sum()
        stretch = slice(start, start + profile.token_kinds_L[place])
        histogram = dict(zip(profile.token_ids[stretch].tolist(), profile.token_counts[stretch].tolist(), strict=True))
        assert histogram == {i: ids.count(i) for i in set(ids)}
    assert profile.token_shares().sum(-1).tolist() == pytest.approx([1.0] * 3)


def test_merging_keeps_the_adapters_routing(tiny_base: Path, tiny_adapter: Path, texts: Path, tmp_path: Path) -> None:
    """The adapter moves tokens; merged, it moves the same ones."""
    merged = tmp_path / "merged"
    lola_ft.merge(tiny_base, tiny_adapter, merged)
    options: dict[str, Any] = {"quantization": None, "device": "cpu"}
    profiles = [
        profile_routing(tiny_base, [texts], **options),
        profile_routing(tiny_adapter, [texts], base=str(tiny_base), **options),
        profile_routing(merged, [texts], **options),
    ]
    base, adapter, whole = profiles
    assert whole.counts_LME.equal(adapter.counts_LME)
    assert not adapter.counts_LME.equal(base.counts_LME)
    assert base.about.base_fingerprint == adapter.about.base_fingerprint


def test_max_tokens_takes_the_first_ones(tiny_base: Path, texts: Path, profile: Profile) -> None:
    few = profile_routing(tiny_base, [texts], quantization=None, device="cpu", max_tokens_per_language=25, sample=40)
    assert few.tokens_L.tolist() == [25, 25, 25]
    assert few.counts_LME.sum(-1).unique().tolist() == [25]
    assert few.choices("sw").equal(profile.choices("sw")[:25])
    tokenizer = open_model(tiny_base, quantization=None, device="cpu").tokenizer
    text = "".join(TEXTS["en"].split("\n\n"))
    ids = [i for part in TEXTS["en"].split("\n\n") for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    first = tokenizer.decode(ids[:25])
    assert text.startswith(first)
    assert few.bytes_L[1] == len(first)


def test_rows_with_prompts_are_counted_by_their_language_column(tiny_base: Path, rows_file: Path) -> None:
    found = profile_routing(
        tiny_base, [rows_file], format="alpaca", language_column="language", quantization=None, device="cpu"
    )
    assert found.languages == ("en", "sw")
    assert found.documents_L.tolist() == [40, 40]


def test_a_profile_names_no_folder_of_the_machine(profile: Profile, tiny_base: Path) -> None:
    assert tiny_base.is_absolute()
    assert profile.about.model == tiny_base.name


def test_a_saved_profile_reads_back_equal(profile: Profile, tmp_path: Path) -> None:
    again = read_profile(save_profile(profile, tmp_path / "new" / "base.safetensors"))
    for field in dataclasses.fields(Profile):
        mine, read = getattr(profile, field.name), getattr(again, field.name)
        assert mine.equal(read) if isinstance(mine, torch.Tensor) else mine == read
    assert (tmp_path / "new" / "base.safetensors").stat().st_size < 8000


def test_equal_digests_mean_equal_tokens(profile: Profile, tiny_base: Path, texts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantization": None, "device": "cpu", "sample": 40}
    again = profile_routing(tiny_base, sorted(texts.iterdir(), reverse=True), **options)
    assert again.sample_digests == profile.sample_digests
    (tmp_path / "sw.txt").write_text(TEXTS["sw"].replace("Amina", "Amani"))
    other = profile_routing(tiny_base, [tmp_path], **options)
    assert other.sample_digests[0] != profile.sample_digests[2]
    cut = profile_routing(tiny_base, [texts], max_length=7, **options)  # other contexts
    assert not set(cut.sample_digests) & set(profile.sample_digests)


@pytest.mark.parametrize(
    ("name", "language"),
    [("sw.txt", "sw"), ("zh_Hans.txt", "zh_Hans"), ("sw_part-03.txt", "sw"), ("ast.train.txt", "ast")],
)
def test_the_language_is_the_beginning_of_the_files_name(
    name: str, language: str, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("moja mbili")
    found = profile_routing(tiny_base, [tmp_path / name], quantization=None, device="cpu")
    assert found.languages == (language,)


def test_mistakes_are_named(
    tiny_base: Path, tmp_path: Path, texts: Path, rows_file: Path, verb: Callable[..., Any]
) -> None:
    (tmp_path / "rows.txt").write_text("moja")
    with pytest.raises(DataError, match="does not begin with a language code"):
        profile_routing(tiny_base, [tmp_path / "rows.txt"])
    with pytest.raises(UserError, match="--max-length 129: must be from 1 to 128, the model's positions"):
        profile_routing(tiny_base, [texts], max_length=129, quantization=None)
    out = tmp_path / "p.safetensors"
    for wrong, message in (
        (["--data", str(tmp_path / "none.txt")], "no such file"),
        (["--data", str(texts), "--format", "prose"], "--format prose: is unknown; choose one of alpaca"),
        (["--data", str(texts), "--unit", "word"], "--unit word: is unknown; choose one of paragraph"),
        (["--data", str(texts), "--quantization", "int8"], "int8"),
        (["--data", str(texts), "--template", "alpaca"], "--template does nothing for format text"),
        (["--data", str(rows_file), "--language-column", "language", "--format", "alpaca", "--unit", "line"], "--unit"),
    ):
        done = verb("routing", "profile", str(tiny_base), *wrong, "--out", str(out))
        assert (done.code, out.exists()) == (2, False)
        assert message in done.err
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "p", "file is not a folder")):
        done = verb("routing", "profile", str(tiny_base), "--data", str(texts), "--out", str(place))
        assert done.code == 2
        assert message in done.err


def test_a_wrong_file_is_named(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_profile(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="not a routing profile"):
        read_profile(tmp_path / "text")
    file = save_profile(profile, tmp_path / "profile")
    save_file(load_file(file), tmp_path / "other", {"format": "lola_ft_routing/99"})
    with pytest.raises(UserError, match="'lola_ft_routing/99'; this version reads lola_ft_routing/2"):
        read_profile(tmp_path / "other")


def test_the_verb_counts_what_the_function_counts(
    tiny_base: Path, texts: Path, tmp_path: Path, verb: Callable[..., Any], profile: Profile
) -> None:
    out = tmp_path / "base.safetensors"
    files = [str(texts / "sw.txt"), "--data", str(texts / "en.txt")]
    done = verb("routing", "profile", str(tiny_base), "--data", *files, "--quantization", "none", "--out", str(out))
    assert done.code == 0, done.err
    found = read_profile(out)
    assert found.counts_LME.equal(profile.counts_LME[1:])
    assert f"{found.tokens_L.sum():,} tokens in 2 languages" in done.out


@pytest.mark.slow
def test_every_language_of_the_nano_bases_text_is_in_the_table(tmp_path: Path, verb: Callable[..., Any]) -> None:
    """Every language of the nano base's text, and each has a family or is constructed."""
    done = verb("routing", "texts", "--out", str(tmp_path / "cldr"))
    assert done.code == 0, done.err
    base = make_base(tmp_path / "base", n_embd=16, n_inner=32, n_head=2)
    found = profile_routing(base, [tmp_path / "cldr"], quantization=None, max_tokens_per_language=100, device="cpu")
    assert len(found.languages) > 140
    assert found.tokens_L.unique().tolist() == [100]
    assert unknown_languages(found.languages) == []


def test_the_tokens_to_come_are_estimated_from_the_files_sizes(tiny_base: Path, tmp_path: Path) -> None:
    """The progress bar counts to it; it is exact once all files are read."""
    for code in ("de", "en", "sw"):
        (tmp_path / f"{code}.txt").write_text("one two three four\n\n" * 20)
    read = Texts(sources_of([tmp_path]), AutoTokenizer.from_pretrained(tiny_base), 16)
    pieces = iter(read)
    next(pieces)
    estimates = []
    for _ in pieces:
        estimates.append(read.estimated_tokens)
    assert estimates[5:] == pytest.approx([read.tokens.total()] * len(estimates[5:]), rel=0.15), "but for blank lines"
    assert read.estimated_tokens == read.tokens.total()
