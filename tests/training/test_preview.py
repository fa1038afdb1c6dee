"""The preview: examples as they will be learned, lengths, and what is dropped."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lola_ft.data import Example, Template, encode
from lola_ft.recipe import load_recipe
from lola_ft.training.preview import END, LEARNED, READ, length_lines, preview, shown


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
