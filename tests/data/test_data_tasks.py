"""Conversations, classification and translation: what becomes of a row, and the message for every bad one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_ft.data import BadRows, Example, Row, Source, Template, encode, encode_texts, read_examples, to_example
from lola_ft.data.encoding import MASKED
from lola_ft.data.formats import FORMATS
from lola_ft.errors import DataError

EOS = 5
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "Moja?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Mbili?"},
    {"role": "assistant", "content": "Two."},
]


def read(fields: dict[str, Any], format: str, /, **keys: Any) -> Example:
    return to_example(Row(fields, "sw.jsonl:7"), Source(format, "sw.jsonl", **keys))


def rendered(example: Example, template: str = "chatml") -> list[str]:
    return Template.load(template).render(example)


def learned(labels: list[int]) -> list[int]:
    return [label for label in labels if label != MASKED]


def test_chatml_renders_what_stands_in_front_of_each_answer() -> None:
    example = read({"messages": CHAT}, "messages", language="sw")
    assert [answer for _, answer in example.exchanges] == ["One.", "Two."]
    assert rendered(example) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nMoja?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nMbili?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_an_editor_that_trims_a_saved_template_changes_no_prompt(tmp_path: Path) -> None:
    template = Template.load("chatml")
    (tmp_path / "saved.jinja").write_text("\n".join(line.rstrip() for line in template.source.splitlines()))
    example = read({"messages": CHAT}, "messages")
    assert rendered(example, str(tmp_path / "saved.jinja")) == rendered(example)


def test_every_answer_of_a_conversation_is_learned_with_its_eos_and_nothing_else(tokenizer: Any) -> None:
    example = read({"messages": CHAT}, "messages")
    encoded = encode([example], tokenizer, Template.load("chatml"), 500)
    [row] = encoded.dataset
    first, second = (encode_texts([answer], tokenizer)[0] for answer in ("One.", "Two."))
    assert learned(row["labels"]) == [*first, EOS, *second, EOS]
    prompts = encode_texts(rendered(example), tokenizer)
    assert row["input_ids"] == [*prompts[0], *first, EOS, *prompts[1], *second, EOS]
    assert all(label in (MASKED, id) for id, label in zip(row["input_ids"], row["labels"], strict=True))


@pytest.mark.parametrize("format", ["alpaca", "prompt_completion", "classification", "translation"])
def test_a_single_request_fits_chatml(format: str) -> None:
    rows = {
        "alpaca": ({"instruction": "Say", "input": "it", "output": "x"}, "Say\n\nit"),
        "prompt_completion": ({"prompt": "Say it", "completion": "x"}, "Say it"),
        "classification": ({"text": "it", "label": "x"}, "Name the label of the text.\n\nit"),
        "translation": (
            {"source": "it", "target": "x", "source_language": "en", "target_language": "sw"},
            "Translate from English to Swahili.\n\nit",
        ),
    }
    fields, said = rows[format]
    assert rendered(read(fields, format)) == [f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"]


def test_other_templates_render_one_exchange_and_refuse_several() -> None:
    single = read({"messages": CHAT[:3]}, "messages")
    assert rendered(single, "plain") == ["Be brief.\n\nMoja?"]
    assert "### Instruction:\nBe brief.\n\nMoja?\n\n### Response:" in rendered(single, "alpaca")[0]
    with pytest.raises(DataError) as caught:
        rendered(read({"messages": CHAT}, "messages"), "alpaca")
    assert str(caught.value) == (
        "sw.jsonl:7: a conversation with 2 answers, and template alpaca renders a single request. "
        "Set data.template to chatml, or use `messages` in a template of your own."
    )


def test_sharegpt_names_mean_the_same() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    found = read({"conversations": turns}, "messages", fields={"messages": "conversations"})
    assert found == read({"messages": [dict(CHAT[1], content="a"), dict(CHAT[2], content="b")]}, "messages")


def test_truncation_drops_the_oldest_exchanges_and_counts_them(tokenizer: Any) -> None:
    example = read({"messages": CHAT[1:]}, "messages")
    template = Template.load("chatml")
    prompts = encode_texts(template.render(example), tokenizer)
    answers = [[*ids, EOS] for ids in encode_texts(["One.", "Two."], tokenizer)]
    last = [*prompts[1], *answers[1]]
    whole = len(prompts[0]) + len(answers[0]) + len(last)
    for length in range(len(answers[1]) + 1, whole):
        encoded = encode([example], tokenizer, template, length, "truncate")
        [row] = encoded.dataset
        assert row["input_ids"] == last[-length:]
        assert learned(row["labels"]) == answers[1]
        total = encoded.report.total
        assert (total.truncated, total.exchanges_cut, total.answers_cut) == (1, 1, 0)


def test_a_label_becomes_its_word() -> None:
    keys: dict[str, Any] = {"labels": {"0": "hapana", "1": "ndiyo", "true": "kweli"}}
    assert read({"text": "a", "label": 1}, "classification", **keys).completion == "ndiyo"
    assert read({"text": "a", "label": "0"}, "classification", **keys).completion == "hapana"
    assert read({"text": "a", "label": True}, "classification", **keys).completion == "kweli"
    assert read({"text": "a", "label": "good"}, "classification").completion == "good"


def test_an_instruction_takes_the_fields_it_names_and_the_others_follow() -> None:
    fields = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
    keys: dict[str, Any] = {"fields": {"text": "premise", "text_pair": "hypothesis"}, "labels": {"0": "yes", "1": "no"}}
    prompt = read(fields, "classification", **keys).prompt
    assert prompt == {
        "instruction": "Which of these labels fits the text: yes, no?",
        "input": "It rains.\nIt is wet.",
        "prompt": "Which of these labels fits the text: yes, no?\n\nIt rains.\nIt is wet.",
    }
    named = read(fields, "classification", instruction="Does {text} mean {text_pair}? {labels}", **keys).prompt
    assert named is not None
    assert named["prompt"] == named["instruction"] == "Does It rains. mean It is wet.? yes, no"
    half = read(fields | {"premise": "{text_pair}"}, "classification", instruction="Read: {text}", **keys).prompt
    assert half is not None
    other = read(fields, "classification", instruction="{text} {other}", **keys).prompt
    assert other is not None
    assert other["instruction"] == "It rains. {other}"
    assert (half["instruction"], half["input"]) == ("Read: {text_pair}", "It is wet.")  # a row's braces stay its own


def test_alpaca_rows_may_share_one_instruction() -> None:
    fields = {"article": "Long {input}.", "summary": "Short."}
    mapping = {"input": "article", "output": "summary"}
    found = read(fields, "alpaca", fields=mapping, instruction="Sum up {this}.")
    assert found.prompt is not None
    assert (found.prompt["instruction"], found.prompt["input"]) == ("Sum up {this}.", "Long {input}.")
    assert found.completion == "Short."


def test_translation_names_its_languages_and_counts_under_the_target() -> None:
    fields = {"translation": {"en": "water", "sw": "maji"}}
    mapping = {"source": "translation.en", "target": "translation.sw"}
    found = read(fields, "translation", fields=mapping, source_language="en", target_language="sw")
    assert found.prompt is not None
    assert found.prompt["prompt"] == "Translate from English to Swahili.\n\nwater"
    assert (found.completion, found.language) == ("maji", "sw")
    row = {"source": "water", "target": "maji", "from": "eng-x", "to": "pt-BR"}
    by_row = read(row, "translation", fields={"source_language": "from", "target_language": "to"}, language="en")
    assert by_row.prompt is not None
    assert by_row.prompt["instruction"] == "Translate from eng-x to Brazilian Portuguese."
    assert by_row.language == "en"
    plain = read(row, "translation", instruction="Tafsiri: {source}", target_language="sw")
    assert plain.prompt is not None
    assert plain.prompt["prompt"] == "Tafsiri: water"


def test_a_field_may_be_a_path_into_lists_and_objects() -> None:
    fields = {"question": "Who?", "answers": {"text": ["Ada", "Bo"]}, "a.b": "dotted"}
    found = read(fields, "prompt_completion", fields={"prompt": "question", "completion": "answers.text.1"})
    assert found.completion == "Bo"
    assert read(fields, "text", fields={"text": "a.b"}).completion == "dotted"


U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
NO_LIST = "field 'messages' must be a list of messages, each with role and content; found"
BAD_ROWS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "messages",
        {"conversation": [U, A]},
        {},
        "field 'messages' is missing (found: conversation). Map it with `fields: {messages: conversation}`.",
    ),
    ("messages", {"messages": "hi"}, {}, f"{NO_LIST} text."),
    ("messages", {"messages": []}, {}, f"{NO_LIST} an empty list."),
    (
        "messages",
        {"messages": "[{'role': 'user'}]"},
        {},
        f"{NO_LIST} text. It looks like a list in Python's notation, as pandas writes to CSV. Write the column with "
        "json.dumps.",
    ),
    ("messages", {"messages": ["hi"]}, {}, "messages[0] must be an object with role and content; found text."),
    (
        "messages",
        {"messages": [{"role": "narrator", "content": "a"}]},
        {},
        "messages[0]: role 'narrator' is unknown; the roles are system, user, assistant and tool, and common other "
        "names of them. Say what it means with `roles: {narrator: assistant}` in the source.",
    ),
    ("messages", {"messages": [{}]}, {}, "messages[0] has no role. Give it one of system, user, assistant and tool."),
    ("messages", {"messages": [{"role": "user", "text": "a"}]}, {}, "messages[0] has no content (found: role, text)."),
    (
        "messages",
        {"messages": [U, dict(A, content="")]},
        {},
        "messages[1].content is empty. Fill it, or remove the row.",
    ),
    ("messages", {"messages": [U, dict(A, content=3)]}, {}, "messages[1].content must be text; found a number."),
    (
        "messages",
        {"messages": [U, A, U]},
        {},
        "messages ends with the user's turn, so there is nothing to learn after it. Remove that turn "
        "(`trim_last_turn: true` in the source does).",
    ),
    (
        "messages",
        {"messages": [SYSTEM]},
        {},
        "messages ends with the system's turn, so there is nothing to learn after it. Remove that turn "
        "(`trim_last_turn: true` in the source does).",
    ),
    ("messages", {"messages": [SYSTEM, A]}, {}, "messages[1]: the assistant answers before the user has asked."),
    (
        "messages",
        {"messages": [U, SYSTEM, A]},
        {},
        "messages[1]: a system message must be the first one. Move or remove it.",
    ),
    (
        "messages",
        {"messages": [U, U, A]},
        {},
        "messages[1]: two user turns in a row. Join them (`join_turns: true` in the source does), or remove the row.",
    ),
    (
        "messages",
        {"messages": [U, A, A]},
        {},
        "messages[2]: two assistant turns in a row. Join them (`join_turns: true` in the source does), or remove the "
        "row.",
    ),
    ("classification", {"text": "a", "label": 3}, {}, "field 'label' is 3. Say what it means with `labels: {3: …}`."),
    (
        "classification",
        {"text": "a", "label": False},
        {},
        "field 'label' is false. Say what it means with `labels: {false: …}`.",
    ),
    (
        "classification",
        {"text": "a", "label": -1},
        {"labels": {"0": "no", "1": "yes"}},
        "field 'label' is '-1', which is not among the labels (0, 1).",
    ),
    ("classification", {"text": "a", "label": None}, {}, "field 'label' must be text; found null."),
    ("classification", {"text": "a", "label": ""}, {}, "field 'label' is empty. Fill it, or remove the row."),
    (
        "classification",
        {"review": "a", "label": "x"},
        {},
        "field 'text' is missing (found: review, label). Map it with `fields: {text: review}`.",
    ),
    (
        "classification",
        {"text": "a", "sentiment": "x"},
        {},
        "field 'label' is missing (found: text, sentiment). Map it with `fields: {label: sentiment}`.",
    ),
    (
        "classification",
        {"text": "a", "label": "x"},
        {"instruction": "{text} {text_pair}"},
        "the instruction uses {text_pair}, and this row has no text_pair.",
    ),
    (
        "translation",
        {"src": "a", "target": "b"},
        {},
        "field 'source' is missing (found: src, target). Map it with `fields: {source: src}`.",
    ),
    (
        "translation",
        {"source": "a", "target": "b"},
        {"source_language": "en"},
        "field 'target_language' is missing (found: source, target). Map it with `fields: {target_language: …}`.",
    ),
    ("translation", {"source": "a", "target": ""}, {}, "field 'target' is empty. Fill it, or remove the row."),
]


@pytest.mark.parametrize(("format", "fields", "keys", "message"), BAD_ROWS)
def test_a_bad_row_is_named(format: str, fields: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(fields, format, **keys)
    assert str(caught.value) == f"sw.jsonl:7: {message}"


DECOMPOSED, COMPOSED = "e\u0301", "\u00e9"


def test_characters_are_composed_only_when_asked(jsonl: Callable[..., Source]) -> None:
    turns = [{"role": "user", "content": DECOMPOSED}, {"role": "assistant", "content": DECOMPOSED}]
    source = jsonl([{"messages": turns * 2}], "messages")
    [kept] = read_examples([source])
    [changed] = read_examples([source], normalize="nfc")
    for example, text in ((kept, DECOMPOSED), (changed, COMPOSED)):
        assert [answer for _, answer in example.exchanges] == [text] * 2
        assert all(text in prompt for prompt in rendered(example))
    [plain] = read_examples([jsonl([{"instruction": DECOMPOSED, "output": "x"}])], normalize="nfc")
    assert plain.prompt is not None
    assert plain.prompt["prompt"] == plain.prompt["instruction"] == COMPOSED


RTL = "שלום \u202eעולם\u202c 123 क्‍ष \u200f\u0627\u0644"


@pytest.mark.parametrize("normalize", ["none", "nfc"])
def test_right_to_left_and_joined_scripts_come_through(
    jsonl: Callable[..., Source], tokenizer: Any, normalize: str
) -> None:
    [example] = read_examples([jsonl([{"prompt": RTL, "completion": RTL}], "prompt_completion")], normalize=normalize)
    [row] = encode([example], tokenizer, Template.load("plain"), 500).dataset
    assert tokenizer.decode(row["input_ids"][:-1]) == RTL + RTL


def test_bad_rows_are_skipped_counted_and_listed(jsonl: Callable[..., Source]) -> None:
    source = jsonl([{"text": "a"}, {"text": ""}, {"txt": "b"}, {"text": "c"}], "text")
    assert source.path is not None
    with open(source.path, "ab") as file:  # noqa: PTH123
        file.write(b'{"text": \n{"text": "d"}\n')
    bad = BadRows()
    assert [row.completion for row in read_examples([source], bad)] == ["a", "c", "d"]
    messages = [
        "rows.jsonl:2: field 'text' is empty. Fill it, or remove the row.",
        "rows.jsonl:3: field 'text' is missing (found: txt). Map it with `fields: {text: txt}`.",
        "rows.jsonl:5: broken JSON at column 9: expecting value.",
    ]
    assert bad.as_dict() == {"total": 3, "messages": messages}  # what may be published names no folder
    assert bad.messages == [message.replace("rows.jsonl", source.path, 1) for message in messages]
    assert bad.counts == {source.path: 3}
    with pytest.raises(DataError, match=r":2: field 'text' is empty"):
        list(read_examples([source]))


def test_a_source_whose_rows_are_all_bad_is_refused(jsonl: Callable[..., Source]) -> None:
    source = jsonl([{"txt": "a"}] * 200, "text")
    bad = BadRows()
    with pytest.raises(DataError) as caught:
        list(read_examples([source], bad))
    assert str(caught.value).startswith(
        f"{source.path}: no row can be used. The first problem: {source.path}:1: field 'text'"
    )
    assert bad.counts.total() == 200
    assert len(bad.messages) == 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "0"]), inner, max_size=3)
    ),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", None])
CHATS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.sampled_from(["a", "", None])}), max_size=5)
NAMES = ["messages", "text", "text_pair", "label", "source", "target", "instruction", "input", "output", "lang"]
ROW = st.dictionaries(st.sampled_from(NAMES), JSON | CHATS | st.just("text"), max_size=6)
KEYS = st.fixed_dictionaries(
    {},
    optional={
        "labels": st.just({"0": "no", "true": "yes"}),
        "language_column": st.just("lang"),
        "source_language": st.just("en"),
        "target_language": st.just("sw"),
        "fields": st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*NAMES, "text.0", "messages.0.content"])),
    },
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(format=st.sampled_from(sorted(FORMATS)), fields=ROW, keys=KEYS)
def test_any_row_in_any_format_is_an_example_or_gives_one_clean_error(
    format: str, fields: dict[str, Any], keys: dict[str, Any]
) -> None:
    try:
        example = read(fields, format, **keys)
    except DataError as error:
        message = str(error)
    else:
        message = example.where
        assert all(answer.strip() for _, answer in example.exchanges)
        assert example.completion.strip()
        if example.prompt is not None:
            assert len(rendered(example)) == len(example.exchanges)
    assert message.startswith("sw.jsonl:7")
    message.encode()
