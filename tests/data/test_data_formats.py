"""From rows to examples, from examples to prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from lola_ft.data import Example, Row, Source, Template, read_examples, to_example
from lola_ft.data.example import prompt_fields
from lola_ft.data.formats import FORMATS
from lola_ft.errors import DataError
from lola_ft.recipe.allowed_values import Format
from lola_ft.row_formats import FORMAT_FIELDS

SAMPLE = Path(__file__).parents[2] / "recipes" / "data" / "alpaca_sample.jsonl"

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Input:\nmaji\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Response:"
)


def read(fields: dict[str, Any], format: str, /, **keys: Any) -> Example:
    return to_example(Row(fields, "sw.jsonl:7"), Source(format, "sw.jsonl", **keys))


def test_the_recipe_schema_knows_the_same_formats() -> None:
    assert set(get_args(Format)) == set(FORMATS) == set(FORMAT_FIELDS)


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
def test_alpaca_takes_a_row_without_input(blank: dict[str, Any]) -> None:
    found = read({"instruction": "Translate.", "output": "water"} | blank, "alpaca", language="sw")
    assert found == Example(
        {"instruction": "Translate.", "input": "", "prompt": "Translate."}, "water", "sw", "sw.jsonl:7"
    )


def test_alpaca_joins_instruction_and_input_to_a_prompt() -> None:
    found = read({"instruction": "Translate.", "input": "maji", "output": " water\n"}, "alpaca")
    assert found.prompt == {"instruction": "Translate.", "input": "maji", "prompt": "Translate.\n\nmaji"}
    assert found.completion == " water\n"  # not a character is changed
    assert found.language == "und"


def test_prompt_and_completion_fit_every_template() -> None:
    found = read({"prompt": "maji =", "completion": " water"}, "prompt_completion")
    assert found.prompt == {"instruction": "maji =", "input": "", "prompt": "maji ="}


def test_a_text_has_no_prompt() -> None:
    assert read({"text": "Habari."}, "text") == Example(None, "Habari.", "und", "sw.jsonl:7")


def test_fields_are_mapped_and_language_is_read_from_a_column() -> None:
    keys = {"fields": {"instruction": "q", "output": "a"}, "language_column": "lang"}
    found = read({"q": "one", "a": "two", "lang": "yo", "instruction": "ignored"}, "alpaca", **keys)
    assert (found.completion, found.language) == ("two", "yo")
    assert found.prompt == prompt_fields("one")


def test_the_language_may_lie_in_an_object() -> None:
    assert read({"text": "a", "meta": {"lang": "yo"}}, "text", language_column="meta.lang").language == "yo"


BAD_ROWS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "alpaca",
        {"instruction": "a", "input": "b", "answer": "c"},
        {},
        "field 'output' is missing (found: instruction, input, answer). Map it with `fields: {output: answer}`.",
    ),
    (
        "alpaca",
        {"instruction": "a", "answer": "c"},
        {"fields": {"output": "reply"}},
        "field 'reply' is missing (found: instruction, answer). Map it with `fields: {output: answer}`.",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "c"},
        {"fields": {"input": "context"}},
        "field 'context' is missing (found: instruction, output). Map it with `fields: {input: …}`.",
    ),
    (
        "alpaca",
        {"question": "a", "output": "b", "id": 3},
        {},
        "field 'instruction' is missing (found: question, output, id). Map it with `fields: {instruction: question}`.",
    ),
    (
        "prompt_completion",
        {"prompt": "a", "lang": "sw", "response": "b"},
        {"language_column": "lang"},
        "field 'completion' is missing (found: prompt, lang, response). Map it with `fields: {completion: response}`.",
    ),
    ("text", {}, {}, "field 'text' is missing (found: no fields). Map it with `fields: {text: …}`."),
    ("text", {"text": 3}, {}, "field 'text' must be text; found a number."),
    ("text", {"text": None}, {}, "field 'text' must be text; found null."),
    ("text", {"text": ["a"]}, {}, "field 'text' must be text; found a list."),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, {}, "field 'input' must be text; found a number."),
    ("text", {"text": ""}, {}, "field 'text' is empty. Fill it, or remove the row."),
    ("alpaca", {"instruction": "a", "output": " \n"}, {}, "field 'output' is empty. Fill it, or remove the row."),
    (
        "prompt_completion",
        {"prompt": "", "completion": "b"},
        {},
        "field 'prompt' is empty. Fill it, or remove the row.",
    ),
    ("text", {"text": "a\ud83d"}, {}, "field 'text' holds half a surrogate pair, which is not valid text. Remove it."),
    ("text", {"text": "a"}, {"language_column": "lang"}, "language column 'lang' is missing (found: text)."),
    ("text", {"text": "a", "lang": None}, {"language_column": "lang"}, "field 'lang' must be text; found null."),
]


@pytest.mark.parametrize(("format", "fields", "keys", "message"), BAD_ROWS)
def test_a_bad_row_is_named(format: str, fields: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(fields, format, **keys)
    assert str(caught.value) == f"sw.jsonl:7: {message}"


def test_examples_come_in_the_order_of_their_sources(jsonl: Callable[..., Source]) -> None:
    source = jsonl([{"text": "a"}, {"text": "b"}], "text", language="sw")
    again = Source("text", source.path, language="de")
    found = [(row.completion, row.language) for row in read_examples([source, again])]
    assert found == [("a", "sw"), ("b", "sw"), ("a", "de"), ("b", "de")]


def test_the_bundled_sample_reads() -> None:
    found = list(read_examples([Source("alpaca", str(SAMPLE), language_column="language")]))
    assert len(found) == 24
    assert len({row.language for row in found}) >= 10
    assert len({(row.prompt or {})["prompt"] for row in found}) == 24


def test_the_alpaca_template_is_stanfords_to_the_letter() -> None:
    template = Template.load("alpaca")
    assert template.prompt("Translate.", "maji") == WITH_INPUT
    assert template.prompt("Translate.") == WITHOUT_INPUT
    assert template.render(read({"instruction": "Translate.", "output": "x"}, "alpaca")) == [WITHOUT_INPUT]


def test_the_plain_template_is_the_prompt_itself() -> None:
    template = Template.load("plain")
    assert template.prompt("maji =\n") == "maji =\n"
    assert template.prompt("Translate.", "maji") == "Translate.\n\nmaji"


@pytest.mark.parametrize("text", ["{{ 3 }} {% x %} {# y #}", "<b> & 'q'", "a\r\nb\n\n", "\u202eשלום"])
@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_a_request_is_never_read_as_template_or_markup(name: str, text: str) -> None:
    assert text in Template.load(name).prompt(text)


def test_a_saved_template_gives_the_same_prompts(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(Template.load("alpaca").source, encoding="utf-8")
    assert Template.load(str(path)).prompt("Translate.", "maji") == WITH_INPUT


BAD_TEMPLATES = [
    ("{{ prompt", "broken template: unexpected end of template, expected 'end of print statement'."),
    ("{{ prompt }}{{ anser }}", "uses 'anser'; it may use only messages, first, instruction, input, prompt."),
    ("Answer:", "leaves the request out. Use `instruction`, `prompt` or `messages` in it."),
    ("{{ instruction }}", "leaves `input` out. Use it too, or `prompt`, which has both."),
    ("{{ prompt.__class__.__mro__ }}", "fails: access to attribute '__class__' of 'str' object is unsafe."),
    ("{{ prompt }}{{ 1 / 0 }}", "fails: division by zero."),
]


@pytest.mark.parametrize(("source", "message"), BAD_TEMPLATES)
def test_a_template_that_cannot_work_is_refused_at_once(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(DataError) as caught:
        Template.load(str(path))
    assert str(caught.value).endswith(message)
    assert str(path) in str(caught.value)


def test_a_template_that_fails_on_a_row_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ prompt }}{{ 1 / (prompt != 'zero') }}")
    template = Template.load(str(tmp_path / "own.jinja"))
    with pytest.raises(DataError, match=r"^sw.jsonl:7: template .*own.jinja fails: division by zero\.$"):
        template.render(read({"prompt": "zero", "completion": "a"}, "prompt_completion"))


def test_an_unknown_template_lists_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Template.load("alpacca")
    assert str(caught.value) == (
        "template 'alpacca' is unknown. Choose alpaca, chatml, plain, or chat for the tokenizer's own chat template, "
        "or give the path of your own template, which ends in .jinja."
    )
    with pytest.raises(DataError, match="no such template"):
        Template.load(str(tmp_path / "none.jinja"))
