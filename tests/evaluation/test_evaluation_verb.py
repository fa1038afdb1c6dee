"""`lola-ft evaluate`: several kinds of model side by side, tasks and mistakes."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from lola_ft.data import Example
from lola_ft.data.encoding import TokenizedRow, _truncate
from lola_ft.data.encoding_report import Counts
from lola_ft.data.turns import Turn
from lola_ft.evaluation.generate_task import _sacrebleu, _tokenizer
from lola_ft.evaluation.overlong_prompts import cut_prompt
from lola_ft.generation import Sampling
from lola_ft.merging import merge
from tests.conftest import Outcome, write_rows

Verb = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run(tiny_adapter: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(tiny_adapter, folder / "adapter")
    own = {"model": str(tiny_base), "revision": "main", "quantization": "none"}
    (folder / "manifest.json").write_text(json.dumps({"recipe": {"base": own}}))
    return folder


@pytest.fixture(scope="module")
def merged(run: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge(tiny_base, run / "adapter", folder, check="none")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "sw.txt").write_text("Jina langu ni Amina\n\none two three\n\nred\n")
    (tmp_path / "en.txt").write_text("four five six\n\nseven eight " + "nine ten " * 60 + "\n")
    return tmp_path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_a_run_and_its_merge_score_alike_and_unlike_the_base(
    verb: Verb, tiny_base: Path, run: Path, merged: Path, texts: Path, tmp_path: Path
) -> None:
    data = ("--data", texts / "sw.txt", "--data", texts / "en.txt", "--language", "sw", "--language", "en")
    outcome = verb("evaluate", tiny_base, run, merged, *data, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "out/loss.json")
    assert [model["kind"] for model in report["models"]] == ["base", "run", "merged"]
    bits = report["results"]["bits_per_byte"]
    assert {language: line["rows"] for language, line in bits.items()} == {"all": 5, "en": 2, "sw": 3}
    one, two, three = (bits["sw"]["models"][str(model)] for model in (tiny_base, run, merged))
    assert abs(one["value"] - two["value"]) > 1e-3
    assert two["value"] == pytest.approx(three["value"], abs=1e-4), "merged and adapter say the same"
    assert two["difference"]["value"] == pytest.approx(two["value"] - one["value"])
    assert one["low"] <= one["value"] <= one["high"]
    rows = [json.loads(line) for line in (tmp_path / "out/loss_rows.jsonl").read_text().splitlines()]
    assert [row["where"].rpartition("/")[2] for row in rows] == [
        "sw.txt:1", "sw.txt:3", "sw.txt:5", "en.txt:1", "en.txt:3",
    ]  # fmt: skip
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    again = verb("evaluate", tiny_base, run, merged, *data, "--batch-size", "2")
    assert again.out == outcome.out.partition("Written to")[0], "the batch size changes nothing that is shown"


def test_a_base_reads_what_the_run_reads(
    verb: Verb, tiny_base: Path, run: Path, rows_file: Path, tmp_path: Path
) -> None:
    """A difference is what training did, not what another prompt does."""
    data = ("--data", rows_file, "--format", "alpaca", "--language", "en", "--max-rows", "4")
    outcome = verb("evaluate", tiny_base, run, *data, "--out", tmp_path / "both")
    assert outcome.code == 0, outcome.err
    assert "written with the template that the other models were trained with" in outcome.err
    file = run / "adapter" / "prompt_template.jinja"
    alone = verb("evaluate", tiny_base, *data, "--template", file, "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    both, own = (read(tmp_path / name / "loss.json") for name in ("both", "alone"))
    assert len({model["template"] for model in [*both["models"], *own["models"]]}) == 1
    values = [report["results"]["loss"]["en"]["models"][str(tiny_base)]["value"] for report in (both, own)]
    assert values[0] == values[1]
    other = tmp_path / "adapter"
    shutil.copytree(run / "adapter", other)
    (other / "prompt_template.jinja").write_text("Say: {{ prompt }}")
    three = verb("evaluate", tiny_base, run, other, "--base", tiny_base, *data)
    assert "prompts are written without a template (plain)" in three.err, "two templates: neither is the base's"


def test_comparing_4_bit_with_unquantised_weights_is_said(
    verb: Verb, tiny_base: Path, run: Path, texts: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "run"
    shutil.copytree(run, quantized)
    file = quantized / "manifest.json"
    file.write_text(file.read_text().replace('"none"', '"nf4"'))
    models = (tiny_base, quantized, "--data", texts / "sw.txt")
    outcome = verb("evaluate", *models)
    assert "differences include rounding" in outcome.out
    assert "include rounding" not in verb("evaluate", *models, "--quantization", "nf4").out


def test_answers_are_compared(verb: Verb, tiny_base: Path, run: Path, rows_file: Path, tmp_path: Path) -> None:
    options = ("--data", rows_file, "--format", "alpaca", "--language-column", "language", "--max-rows", "3")
    task = ("--task", "generate", "--max-new-tokens", "6", "--template", "plain", "--out", tmp_path / "out")
    outcome = verb("evaluate", tiny_base, run, *options, *task)
    assert outcome.code == 0, outcome.err
    results = read(tmp_path / "out/generate.json")["results"]
    rows = [json.loads(line) for line in (tmp_path / "out/generate_rows.jsonl").read_text().splitlines()]
    assert [row["language"] for row in rows].count("sw") == 3
    said = [row["models"][str(run)] for row in rows]
    chrf = sacrebleu.corpus_chrf([one["answer"].strip() for one in said], [[one["reference"] for one in said]]).score
    assert results["chrf"]["all"]["models"][str(run)]["value"] == pytest.approx(chrf)
    bleu = sacrebleu.corpus_bleu([one["answer"].strip() for one in said], [[one["reference"] for one in said]]).score
    assert results["bleu"]["all"]["models"][str(run)]["value"] == pytest.approx(bleu)
    exact = sum(one["ended"] and one["answer"].strip() == one["reference"] for one in said) / 6
    assert results["exact_match"]["all"]["models"][str(run)]["value"] == exact


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("zh", "zh"),
        ("zho_Hans", "zh"),
        ("yue", "zh"),
        ("jpn_Jpan", "char"),
        ("th", "char"),
        ("sw", "13a"),
        ("und", "13a"),
    ],
)
def test_bleu_cuts_a_language_into_words_whatever_its_code(language: str, words: str) -> None:
    assert _tokenizer(language) == words


def test_labels_are_choices(verb: Verb, tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": "one two", "label": 0}, {"text": "Amina", "label": 1}, {"text": "red", "label": 0}]
    data = ("--data", write_rows(tmp_path / "rows.jsonl", rows), "--format", "classification", "--language", "en")
    labels = ("--label", "0=red", "--label", "1=green blue", "--label", "2=nine")
    outcome = verb("evaluate", tiny_base, *data, *labels, "--task", "choice", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "out/choice_rows.jsonl").read_text().splitlines()]
    assert lines[1]["models"][str(tiny_base)]["choices"] == ["red", "green blue", "nine"]
    assert [line["models"][str(tiny_base)]["right"] for line in lines] == [0, 1, 0]
    results = read(tmp_path / "out/choice.json")["results"]
    assert results["chance"]["en"]["models"][str(tiny_base)]["value"] == pytest.approx(1 / 3)


def test_rows_may_bring_their_own_choices(verb: Verb, tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {"q": "one", "choices": ["red", "blue"], "answer": "blue", "lang": "sw"},
        {"q": "two", "choices": ["red", "blue", "green"], "answer": 2, "lang": "en"},
    ]
    data = ("--data", write_rows(tmp_path / "rows.jsonl", rows), "--format", "choices", "--field", "prompt=q")
    outcome = verb(
        "evaluate", tiny_base, *data, "--language-column", "lang", "--task", "choice", "--out", tmp_path / "out"
    )
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "out/choice_rows.jsonl").read_text().splitlines()]
    assert [line["models"][str(tiny_base)]["right"] for line in lines] == [1, 2]
    assert [line["language"] for line in lines] == ["sw", "en"]


ROW = {"prompt": "one", "choices": ["red", "blue"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "one", "choices": ["red", "blue"]}, r"rows.jsonl:1: field 'answer' is missing"),
        (ROW | {"answer": 2}, "'answer' is 2; it must be one of the choices, or its index from 0"),
        (ROW | {"answer": True}, "it must be one of the choices"),
        (ROW | {"choices": ["red"]}, "a list of at least two texts"),
        (ROW | {"choices": ["red", "red"]}, "holds the same text twice"),
        (ROW | {"choices": ["red", ""]}, "field 'choices'[1] is empty"),
    ],
)
def test_bad_choices_are_named(verb: Verb, tiny_base: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row])
    outcome = verb("evaluate", tiny_base, "--data", data, "--format", "choices", "--task", "choice")
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Give held-out rows with --data"),
        (("--data", "rows.jsonl"), "say what its rows are with --format"),
        (("--data", "rows.jsonl", "--format", "other"), "--format 'other' is unknown"),
        (("--data", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--data", "rows.jsonl", "--format", "alpaca", "--task", "other"), "--task 'other' is unknown"),
        (("--data", "rows.jsonl", "--format", "alpaca", "--task", "choice"), "--task choice needs --format"),
        (("--data", "rows.jsonl", "--format", "choices"), "--format choices is for --task choice"),
        (("--data", "rows.jsonl", "--format", "alpaca", "--field", "answer=x"), "has no such field"),
        (("--data", "rows.jsonl", "--format", "alpaca", "--label", "0=x"), "--label belongs to format classification"),
        (("--data", "rows.jsonl", "--format", "alpaca", "--task", "choice", "--stride", "3"), "--stride does nothing"),
        (("--data", "a.txt", "--data", "b.txt", "--language", "a", "--language", "b", "--language", "c"), "3 times"),
        (("--data", "a.txt", "--language", "a", "--language-column", "b"), "not both"),
        (("--data", "a.txt", "--language", " "), "--language is empty"),
        (("--data", "a.txt", "--task", "generate"), "a text has no prompt to answer"),
        (("--data", "a.txt", "--overlong", "skip"), "--overlong does nothing in --task loss"),
        (
            ("--data", "a.txt", "--task", "generate", "--overlong", "drop"),
            "--overlong 'drop' is unknown; choose one of error, skip, truncate",
        ),
        (("--data", "a.txt", "--unit", "word"), "--unit word: is unknown; choose one of paragraph"),
        (("--data", "rows.jsonl", "--format", "alpaca", "--unit", "line"), "--unit divides .txt files"),
        (("--data", "a.txt", "--template", "alpaca"), "--template does nothing for texts"),
        (("--data", "a.txt", "--max-new-tokens", "5"), "--max-new-tokens does nothing in --task loss"),
        (("--data", "a.txt", "--base", "other"), "--base is for runs and adapters"),
        (("--data", "a.txt", "--out", "b.txt"), "b.txt is not a folder"),
        (("--data", "a.txt", "--out", "b.txt/deep"), "b.txt is not a folder"),
    ],
)
def test_mistakes_are_one_message(
    verb: Verb, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "one", "output": "two"}])
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    outcome = verb("evaluate", tiny_base, *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_missing_model_is_named_before_any_is_loaded(verb: Verb, tiny_base: Path, texts: Path) -> None:
    outcome = verb("evaluate", tiny_base, texts / "nowhere", "--data", texts / "sw.txt")
    assert outcome.code == 2
    assert "nowhere: no such folder" in outcome.err
    assert "…" not in outcome.out
    twice = verb("evaluate", tiny_base, tiny_base, "--data", texts / "sw.txt")
    assert "given twice" in twice.err


@pytest.fixture
def long_rows(tmp_path: Path) -> tuple[str, ...]:
    """Rows 2 and 4, English and Swahili, have prompts of more tokens than the tiny base has positions (128)."""
    rows = [
        {"prompt": prompt, "completion": "two", "language": language}
        for prompt, language in (("one", "en"), ("one " * 200, "en"), ("red", "sw"), ("three " * 300 + "red", "sw"))
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    options = ("--format", "prompt_completion", "--language-column", "language", "--max-new-tokens", "6")
    return ("--data", str(file), *options, "--template", "plain", "--task", "generate", "--batch-size", "1")


def test_long_prompts_are_named_before_any_model_is_loaded(
    verb: Verb, tiny_base: Path, long_rows: tuple[str, ...]
) -> None:
    outcome = verb("evaluate", tiny_base, *long_rows)
    assert outcome.code == 2
    assert "rows.jsonl:2: the prompt has" in outcome.err
    assert "128 positions for prompt and answer together. So is 1 more." in outcome.err
    assert "--overlong skip" in outcome.err
    assert "…" not in outcome.out


def test_long_prompts_are_skipped_or_cut(
    verb: Verb, tiny_base: Path, long_rows: tuple[str, ...], tmp_path: Path
) -> None:
    skipped = verb("evaluate", tiny_base, *long_rows, "--overlong", "skip", "--out", tmp_path / "skipped")
    assert skipped.code == 0, skipped.err
    assert "2 rows are skipped because their prompts are too long: en 1, sw 1." in skipped.out
    report = read(tmp_path / "skipped/generate.json")
    assert report["overlong"] == {"policy": "skip", "rows": {"en": 1, "sw": 1}}
    assert report["results"]["chrf"]["all"]["rows"] == 2
    cut = verb("evaluate", tiny_base, *long_rows, "--overlong", "truncate", "--out", tmp_path / "cut")
    assert cut.code == 0, cut.err
    assert "2 prompts are too long; their beginning is cut: en 1, sw 1." in cut.out
    answers = [
        [json.loads(line) for line in (tmp_path / name / "generate_rows.jsonl").read_text().splitlines()]
        for name in ("skipped", "cut")
    ]
    assert len(answers[1]) == 4
    assert answers[1][::2] == answers[0], "rows that are not too long are answered alike"


def test_skipping_every_row_is_an_error(verb: Verb, tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "one " * 200, "completion": "two"}]
    data = ("--data", write_rows(tmp_path / "rows.jsonl", rows), "--format", "prompt_completion", "--task", "generate")
    outcome = verb("evaluate", tiny_base, *data, "--overlong", "skip")
    assert outcome.code == 2
    assert "the prompts of all 1 rows are too long" in outcome.err


def test_a_cut_prompt_is_what_training_keeps_of_it() -> None:
    """With an answer as long as `--max-new-tokens`; its last token is the end that training adds."""
    turns = [Turn([1, 2, 3], [4, 9], ""), Turn([5, 6], [7, 9], ""), Turn([10, 11, 12], [13, 14, 9], "")]
    example = Example({"prompt": ""}, "", "en", "", (({}, ""), ({}, "")))
    for positions in range(15, 4, -1):
        [kept] = _truncate(TokenizedRow(example, turns), positions, Counts())
        assert cut_prompt(turns, positions, Sampling(3)) == kept.ids[:-3]
    assert cut_prompt(turns, 4, Sampling(100)) == [11, 12], "half of the positions, where no answer fits"


def test_without_sacrebleu_its_extra_is_named(
    verb: Verb, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *arguments)

    from lola_ft.evaluation import generate_task

    generate_task._chrf.cache_clear()
    assert _sacrebleu()
    monkeypatch.setattr(builtins, "__import__", without)
    outcome = verb("evaluate", tiny_base, "--data", rows_file, "--format", "alpaca", "--task", "generate")
    assert outcome.code == 2
    assert "lola-ft[evaluate]" in outcome.err
