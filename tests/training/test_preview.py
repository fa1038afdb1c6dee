"""The preview: examples as they will be learned, lengths, and what is dropped."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lola_ft.data import Example, Source, Template, encode, encode_judged, read_examples
from lola_ft.recipe import load_recipe
from lola_ft.training.preview import END, LEARNED, READ, WORSE, judged, length_lines, preview, shown
from tests.conftest import alpaca_rows, write_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def chat(tokenizer: Any) -> dict[str, list[int]]:
    fields = [{"instruction": text, "input": "", "prompt": text} for text in ("שאלה\x1b[2J", "two?")]
    example = Example(fields[1], " four", "sw", "x:1", ((fields[0], " one\nline"),))
    template = Template("mine", "{{ messages[0].content }}:")
    return encode([example], tokenizer, template, 200).dataset[0]


def test_learned_tokens_are_coloured_read_ones_dim_and_eos_has_its_name(tokenizer: Any) -> None:
    row = chat(tokenizer)
    text = shown(row["input_ids"], row["labels"], tokenizer)
    spans = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert spans == [
        ("שאלה\\x1b[2J:", READ),  # what could steer the terminal is written out
        (" one↵\nline", LEARNED),
        ("<|endoftext|>", END),
        ("two?:", READ),
        (" four", LEARNED),
        ("<|endoftext|>", END),
    ]


def test_a_terminal_without_colours_gets_brackets(tokenizer: Any) -> None:
    row = chat(tokenizer)
    text = shown(row["input_ids"], row["labels"], tokenizer, plain=True).plain
    assert text == "שאלה\\x1b[2J:⟦ one↵\nline<|endoftext|>⟧two?:⟦ four<|endoftext|>⟧"


def test_a_long_stretch_loses_its_middle(tokenizer: Any) -> None:
    ids = tokenizer("a" * 5000)["input_ids"]
    text = shown(ids, [-100] * len(ids), tokenizer).plain
    assert " […] " in text
    assert len(text) < 1300


JUDGED = {
    "dpo": ("preference", {"prompt": "hi", "chosen": " four", "rejected": " two"}, ["chosen", "rejected"]),
    "kto good": ("unpaired_preference", {"prompt": "hi", "completion": " four", "label": True}, ["good"]),
    "kto bad": ("unpaired_preference", {"prompt": "hi", "completion": " two", "label": False}, ["bad"]),
}


@pytest.mark.parametrize("case", JUDGED)
def test_judged_answers_are_named_and_a_worse_one_is_not_shown_as_learned(
    case: str, tokenizer: Any, tmp_path: Path
) -> None:
    format, fields, names = JUDGED[case]
    file = write_rows(tmp_path / "rows.jsonl", [fields])
    examples = read_examples([Source(format, str(file))])
    row = encode_judged(examples, tokenizer, Template.load("plain"), 100).dataset[0]
    text = judged(row, tokenizer)
    shown_as = {text.plain[span.start : span.end]: span.style for span in text.spans}
    better, worse = {"dpo": (" four", " two"), "kto good": (" four", None), "kto bad": (None, " two")}[case]
    assert {answer: shown_as[answer] for answer in (better, worse) if answer} == {
        answer: style for answer, style in ((better, LEARNED), (worse, WORSE)) if answer
    }
    assert [name for name in ("chosen", "rejected", "good", "bad") if f"\n{name}, " in text.plain] == names
    plain = judged(row, tokenizer, plain=True).plain
    assert ("⟦ four<|endoftext|>⟧" in plain) == (better is not None)
    assert "⟦ two" not in plain


@pytest.mark.slow
@pytest.mark.parametrize("verb_name", ["preview", "plan", "train"])
def test_unused_fields_are_listed_before_training(
    verb_name: str, recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [row | {"sources": [["a", "b"]] if place < 3 else []} for place, row in enumerate(alpaca_rows(8))]
    file = write_rows(tmp_path / "a b.jsonl", rows)
    recipe = recipe_file(data={"sources": [{"path": str(file), "format": "alpaca"}]})
    for _ in range(2):  # from the file, and from the cache
        outcome = verb(verb_name, recipe, *(["--dry-run"] if verb_name == "train" else []))
        assert outcome.code == 0, outcome.err
        assert f"{file}: fields not used: language (8 of 8 rows), sources (3 of 8 rows).\n" in outcome.out


@pytest.mark.slow
def test_a_batch_larger_than_the_data_is_said(recipe_file: Callable[..., Path], verb: Callable[..., Any]) -> None:
    batch = {"max_steps": 1, "micro_batch_size": 50, "grad_accum_steps": 2}
    recipe = recipe_file(data={"packing": False}, train=batch)
    said = "A step takes 100 rows (micro batch times accumulation) and the data has 80: each step is a whole epoch."
    for name in ("plan", "train"):
        outcome = verb(name, recipe)
        assert outcome.code == 0, outcome.err
        assert said in outcome.out
    assert "whole epoch" not in verb("plan", recipe_file(data={"packing": False})).out


def test_the_histogram_counts_every_sequence(tokenizer: Any) -> None:
    texts = [Example(None, "one two three " * times, "sw", "x:1") for times in (1, 1, 1, 10)]
    encoded = encode(texts, tokenizer, Template.load("plain"), 200)
    lengths = sorted(len(ids) for ids in encoded.dataset["input_ids"])
    first, *lines = length_lines(encoded, 200)
    assert first == f"Lengths: median {lengths[1]}, longest {lengths[-1]}, data.max_length 200"
    assert sum(int(line.split()[3]) for line in lines) == 4
    assert int(lines[-1].split()[3]) == 1
    fullest = next(line for line in lines if int(line.split()[3]) == 3)
    assert fullest.endswith("█" * 40)
    assert lines[-1].count("█") == 13


def test_the_verb_shows_some_of_each_language_and_writes_nothing(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = verb("preview", recipe_file(), "--examples", "1")
    assert outcome.code == 0, outcome.err
    assert "Training data" in outcome.out
    assert "en: " in outcome.out
    assert "sw: " in outcome.out
    assert outcome.out.count("⟦") == 3  # one of each language, and the legend
    assert "###Response:⟦one<|endoftext|>⟧" in "".join(outcome.out.split())
    assert not (tmp_path / "run").exists()


def test_a_language_code_is_never_read_as_markup(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    rows = tmp_path / "odd.csv"
    rows.write_text("text,lang\none,[/]\ntwo,[bold]\nthree,[bold]\n")
    sources = [{"path": str(rows), "format": "text", "language_column": "lang"}]
    outcome = verb("preview", recipe_file(data={"sources": sources, "language_temperature": 2, "max_per_language": 1}))
    assert outcome.code == 0, outcome.err
    assert "[/]: " in outcome.out
    assert "│ [bold]" in outcome.out


def test_colours_reach_the_terminal(recipe_file: Callable[..., Path]) -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=100)
    preview(load_recipe(recipe_file()), examples=1, languages=1, console=console)
    assert "\x1b[30;42m" in out.getvalue()
    assert "⟦" not in out.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"model": "./nowhere"}}, "./nowhere: no such folder"),
        ({"data": {"max_length": 4000}}, "128 learned positions"),
        ({"data": {"max_length": 256}}, "128 learned positions"),
        ({"data": {"sources": [{"path": "nowhere.csv", "format": "text"}]}}, "nowhere.csv: no such file in"),
        ({"data": {"template": "nothing"}}, "template 'nothing' is unknown"),
    ],
)
def test_a_mistake_is_one_message(
    recipe_file: Callable[..., Path], verb: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    outcome = verb("preview", recipe_file(**changes))
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
