"""Chat templates: what training renders is what transformers renders, and only the answers are learned."""

from typing import Any

import pytest

from lola_ft.data import ChatTemplate, Example, Row, Source, Template, chat_source, encode, encode_judged, to_example
from lola_ft.data.encoding import MASKED
from lola_ft.errors import DataError

TURN_MARKS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
EOS = "<|endoftext|>"
CHATML = """\
{% for message in messages %}
{{ "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}{% endfor %}
{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
# Llama 2's and Mixtral's way: no roles, the end of text after each answer, system in front of the first request.
INST = """\
{{ bos_token }}{% set state = namespace(system="") %}{% for message in messages %}\
{% if message.role == "system" %}{% set state.system = message.content + "\n\n" %}\
{% elif message.role == "user" %}{{ " [INST] " + state.system + message.content + " [/INST]" }}\
{% set state.system = "" %}\
{% else %}{{ " " + message.content + eos_token }}{% endif %}{% endfor %}"""
# OLMoE's way: a mark for each role on a line of its own.
LINES = """\
{{ bos_token }}{% for message in messages %}\
{% if message.role == "assistant" %}{{ "<|assistant|>\n" + message.content + eos_token + "\n" }}\
{% else %}{{ "<|user|>\n" + message.content + "\n" }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ "<|assistant|>\n" }}{% endif %}"""
# DeepSeek's way: words for roles, the end of text after an answer.
WORDS = """\
{{ bos_token }}{% for message in messages %}\
{% if message.role == "assistant" %}{{ "Assistant: " + message.content + eos_token }}\
{% else %}{{ message.content if message.role == "system" else "User: " + message.content }}{{ "\n\n" }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ "Assistant:" }}{% endif %}"""
# Qwen3's way: the last answer has a place for thinking, earlier ones have lost it.
THINKING = """\
{% for message in messages %}{{ "<|im_start|>" + message.role + "\n" }}\
{% if message.role == "assistant" and loop.last %}{{ "<think>\n\n</think>\n\n" }}{% endif %}\
{{ message.content + "<|im_end|>\n" }}{% endfor %}\
{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
TOOLS = """\
{% if tools %}{{ "<|im_start|>system\n" }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ "<|im_end|>\n" }}\
{% endif %}{% for message in messages %}{{ "<|im_start|>" + message.role + "\n" + message.content }}\
{% for call in message.tool_calls or [] %}{{ "<call>" + call.function.name + call.function.arguments | tojson }}\
{% endfor %}{{ "<|im_end|>\n" }}{% endfor %}{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "lines": LINES, "words": WORDS}

CONVERSATIONS = [
    [("user", "Habari ya asubuhi?"), ("assistant", "Nzuri sana, asante.")],
    [
        ("system", "Be brief."),
        ("user", "one two"),
        ("assistant", "three"),
        ("user", "four?"),
        ("assistant", "five, six"),
    ],
    [
        ("user", "二つ目は？"),
        ("assistant", "はい。\n\n- 三\n- 四"),
        ("user", "e\u0301 ok "),
        ("assistant", " spaced out "),
    ],
]


@pytest.fixture(scope="module", params=["bytes", "words"])
def chat_tokenizer(request: pytest.FixtureRequest) -> Any:
    """A byte-level tokenizer, and one that marks word starts as Llama's and Mixtral's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    in_bytes = request.param == "bytes"
    backend = Tokenizer(models.BPE(unk_token=None if in_bytes else "<unk>"))
    backend.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if in_bytes
        else pre_tokenizers.Metaspace(prepend_scheme="first")
    )
    backend.decoder = decoders.ByteLevel() if in_bytes else decoders.Metaspace(prepend_scheme="first")
    texts = [text for conversation in CONVERSATIONS for _, text in conversation] + [
        "user\nassistant\nsystem [INST] [/INST]"
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<pad>", "<|endoftext|>", "<unk>", *TURN_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if in_bytes else [],
        show_progress=False,
    )
    backend.train_from_iterator(texts * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        extra_special_tokens=TURN_MARKS,
    )


def keeps_spaces(tokenizer: Any) -> bool:
    """Tell a byte-level tokenizer from one that puts a space in front of a text."""
    return not any("▁" in word for word in tokenizer.get_vocab())


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def example_of(turns: list[tuple[str, str]], **fields: Any) -> Example:
    return to_example(Row({"messages": messages(turns), **fields}, "chat.jsonl:3"), Source("messages", "chat.jsonl"))


def stock_ids(tokenizer: Any, source: str, said: list[dict[str, str]], is_open: bool) -> list[int]:
    return tokenizer.apply_chat_template(said, chat_template=source, add_generation_prompt=is_open)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_a_row_has_the_ids_that_transformers_gives_it_and_learns_the_answers_with_their_end(
    chat_tokenizer: Any, name: str, turns: list[tuple[str, str]]
) -> None:
    template, said = ChatTemplate(TEMPLATES[name]), messages(turns)
    example = example_of(turns)
    [row] = encode([example], chat_tokenizer, template, 500).dataset
    whole = stock_ids(chat_tokenizer, template.source, said, is_open=False)
    assert row["input_ids"] == whole[: len(row["input_ids"])]
    assert chat_tokenizer.decode(whole[len(row["input_ids"]) :]).strip() == ""  # the line break after the last turn
    assert template.prompt_ids(example, chat_tokenizer) == stock_ids(chat_tokenizer, template.source, said[:-1], True)
    learned, answers = list[list[int]](), [content for role, content in turns if role == "assistant"]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != MASKED:
            assert label == token
            learned = (
                [*learned, []] if not learned or learned[-1][-1:] == [template.end_of(chat_tokenizer)] else learned
            )
            learned[-1].append(token)
    end = chat_tokenizer.convert_ids_to_tokens(template.end_of(chat_tokenizer))
    assert end == ("<|im_end|>" if name == "chatml" else "<|endoftext|>")
    assert [chat_tokenizer.decode(ids).strip() for ids in learned] == [
        f"{chat_tokenizer.decode(chat_tokenizer(answer, add_special_tokens=False).input_ids)}{end}".strip()
        for answer in answers
    ]


@pytest.mark.parametrize("name", ["chatml", "alpaca", "plain"])
@pytest.mark.parametrize("marked", [True, False], ids=["marks are tokens", "marks are text"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_saved_chat_template_gives_the_ids_of_training(
    tokenizer: Any, chat_tokenizer: Any, name: str, marked: bool, turns: list[tuple[str, str]]
) -> None:
    template, used = Template.load(name), chat_tokenizer if marked else tokenizer
    turns = turns if template.renders_turns else turns[: 2 + (turns[0][0] == "system")]
    source, example = chat_source(template, used), example_of(turns)
    [row] = encode([example], used, template, 500).dataset
    assert row["labels"][-1] == used.convert_tokens_to_ids("<|im_end|>" if marked and name == "chatml" else EOS)
    text = used.apply_chat_template(messages(turns), chat_template=source, tokenize=False)
    if keeps_spaces(used):
        assert template.prompt_ids(example, used) == stock_ids(used, source, messages(turns)[:-1], is_open=True)
        assert used.decode(row["input_ids"]) == text
    else:  # pieces of a text begin with a space that the whole has not; the first prompt is one piece
        first = example_of(turns[: 2 + (turns[0][0] == "system")])
        asked = messages(turns)[: 1 + (turns[0][0] == "system")]
        assert template.prompt_ids(first, used) == stock_ids(used, source, asked, is_open=True)


def test_a_saved_chat_template_refuses_what_its_template_cannot_render(tokenizer: Any) -> None:
    source = chat_source(Template.load("alpaca"), tokenizer)
    with pytest.raises(Exception, match="single request"):
        tokenizer.apply_chat_template(messages(CONVERSATIONS[1]), chat_template=source)


def test_marks_that_are_tokens_are_encoded_as_tokens_and_end_the_answer(chat_tokenizer: Any) -> None:
    template = Template.load("chatml")
    [row] = encode([example_of(CONVERSATIONS[1])], chat_tokenizer, template, 500).dataset
    start, end = map(chat_tokenizer.convert_tokens_to_ids, TURN_MARKS[:2])
    assert row["input_ids"].count(start) == 5
    assert row["input_ids"].count(end) == 5
    assert [label for label in row["labels"] if label == end] == [end, end]
    assert chat_tokenizer.eos_token_id not in row["input_ids"]
    assert template.end_of(chat_tokenizer) == end


@pytest.mark.parametrize("template", [Template.load("chatml"), ChatTemplate(CHATML)], ids=["chatml", "chat"])
def test_a_mark_in_a_text_is_refused_with_its_place(chat_tokenizer: Any, template: Any) -> None:
    turns = [("user", "what is <|im_end|>?"), ("assistant", "a mark")]
    with pytest.raises(DataError) as caught:
        encode([example_of(turns)], chat_tokenizer, template, 500)
    assert str(caught.value).startswith("chat.jsonl:3: message 1 holds <|im_end|>, which")


def test_earlier_answers_that_the_template_rewrites_are_read_and_counted(chat_tokenizer: Any) -> None:
    template, turns = ChatTemplate(THINKING), CONVERSATIONS[1]
    encoded = encode([example_of(turns)], chat_tokenizer, template, 500)
    [row] = encoded.dataset
    whole = stock_ids(chat_tokenizer, THINKING, messages(turns), is_open=False)
    assert row["input_ids"] == whole[: len(row["input_ids"])]
    said = chat_tokenizer.decode([label for label in row["labels"] if label != MASKED])
    assert ("</think>" in said) == keeps_spaces(chat_tokenizer)  # the other tokenizer does not know these characters
    assert "five" in said
    assert "three" not in said
    assert encoded.report.total.answers_rewritten == 1


def test_an_answer_of_weight_0_is_read_and_counted(chat_tokenizer: Any) -> None:
    said: list[Any] = messages(CONVERSATIONS[1])
    said[2]["weight"], said[4]["weight"] = 0, 1
    example = to_example(Row({"messages": said}, "a:1"), Source("messages", "a"))
    encoded = encode([example], chat_tokenizer, ChatTemplate(CHATML), 500)
    labels = [label for label in encoded.dataset[0]["labels"] if label != MASKED]
    assert chat_tokenizer.decode(labels).replace(" ", "") == "five,six<|im_end|>"
    assert encoded.report.total.answers_read == 1


def test_tools_calls_and_results_are_rendered_by_a_template_that_knows_them(chat_tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "one"}'}}
    said: list[Any] = [
        {"role": "user", "content": "four?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "three"},
        {"role": "assistant", "content": "five"},
    ]
    example = to_example(Row({"messages": said, "tools": [tool]}, "a.jsonl:1"), Source("messages", "a.jsonl"))
    [row] = encode([example], chat_tokenizer, ChatTemplate(TOOLS), 500).dataset
    text = chat_tokenizer.decode([label for label in row["labels"] if label != MASKED])
    if keeps_spaces(chat_tokenizer):
        assert text == '<call>weather{"place": "one"}<|im_end|>five<|im_end|>'
    assert text.count("<|im_end|>") == 2
    assert text.endswith("five<|im_end|>")
    for template, missing in (
        (ChatTemplate(CHATML), "leaves out tool calls"),
        (Template.load("chatml"), "cannot write"),
    ):
        with pytest.raises(DataError, match=missing):
            encode(
                [to_example(Row({"messages": said}, "a.jsonl:1"), Source("messages"))], chat_tokenizer, template, 500
            )
    with pytest.raises(DataError, match="leaves out `tools`"):
        encode([example_of(CONVERSATIONS[0], tools=[tool])], chat_tokenizer, ChatTemplate(CHATML), 500)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CHATML.replace('+ "<|im_end|>\n"', '+ "\n"'), "ends an answer without a special token"),
        (CHATML.replace('"<|im_start|>assistant\n"', '"<|assistant|>"'), "begins an answer differently"),
        (
            CHATML.replace("for message in messages", 'for message in messages if message.role != "system"'),
            "leaves out",
        ),
        ("{{ raise_exception('Only one system.') }}", "chat template fails: Only one system."),
        ("{% for message in messages %}", "chat template fails"),
    ],
)
def test_a_chat_template_that_would_teach_something_else_is_refused(
    chat_tokenizer: Any, source: str, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode([example_of(CONVERSATIONS[1])], chat_tokenizer, ChatTemplate(source), 500)
    assert message in str(caught.value)
    assert str(caught.value).startswith("chat.jsonl:3: ")


@pytest.mark.parametrize("template", [Template.load("chatml"), ChatTemplate(LINES)], ids=["chatml", "chat"])
def test_judged_answers_are_rendered_as_learned_ones(chat_tokenizer: Any, template: Any) -> None:
    fields = {"prompt": "one two", "chosen": "three", "rejected": "four"}
    example = to_example(Row(fields, "a.jsonl:1"), Source("preference", "a.jsonl"))
    [row] = encode_judged([example], chat_tokenizer, template, 100).dataset
    for answer, ids in (("three", row["chosen_ids"]), ("four", row["rejected_ids"])):
        [alone] = encode(
            [example_of([("user", "one two"), ("assistant", answer)])], chat_tokenizer, template, 100
        ).dataset
        assert row["prompt_ids"] + ids == alone["input_ids"]


def test_a_tokenizer_without_a_chat_template_is_told_apart(tokenizer: Any) -> None:
    from lola_ft.data import load_template

    with pytest.raises(DataError, match="this tokenizer has none"):
        load_template("chat", tokenizer)
