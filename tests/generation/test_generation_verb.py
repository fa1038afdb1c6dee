"""`lola-ft generate` on a base, an adapter and a conversation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lola_ft.data import Template, encode_texts
from lola_ft.errors import UserError
from lola_ft.generation import Answer, Sampling
from lola_ft.generation.chat import chat
from lola_ft.quantization import load_base
from tests.conftest import Outcome, write_rows

Verb = Callable[..., Outcome]
SHORT = ("--max-new-tokens", "6")


def test_a_prompt_and_a_file_get_the_same_answer(verb: Verb, tiny_base: Path, tmp_path: Path) -> None:
    spoken = verb("generate", tiny_base, "--prompt", "one two", *SHORT)
    assert spoken.code == 0
    assert "plain" in spoken.err
    assert "cut after 6 tokens" in spoken.err
    asked = write_rows(tmp_path / "in.jsonl", [{"prompt": "three", "id": 1}, {"prompt": "one two", "id": 2}])
    out = tmp_path / "deep" / "out.jsonl"
    written = verb("generate", tiny_base, "--file", asked, "--out", out, *SHORT)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [1, 2]
    assert lines[1]["answer"] + "\n" == spoken.out
    assert (lines[1]["ended"], lines[1]["tokens"]) == (False, 6)
    assert "2 of 2 answers were cut" in written.err
    printed = verb("generate", tiny_base, "--file", asked, *SHORT)
    assert printed.out == out.read_text()


def test_an_adapter_given_in_either_way_gives_the_same_answer(verb: Verb, tiny_base: Path, tiny_adapter: Path) -> None:
    one = verb("generate", tiny_adapter, "--base", tiny_base, "--prompt", "one two", *SHORT)
    two = verb("generate", tiny_base, "--adapter", tiny_adapter, "--prompt", "one two", *SHORT)
    plain = verb("generate", tiny_base, "--prompt", "one two", *SHORT)
    assert one.code == 0, one.err
    assert one.out == two.out != plain.out
    assert "plain" not in one.err, "the adapter has its own template"


def test_the_template_shapes_the_prompt(verb: Verb, tiny_base: Path) -> None:
    rendered = Template.load("chatml").prompt("one")
    by_hand = verb("generate", tiny_base, "--prompt", rendered, *SHORT)
    assert verb("generate", tiny_base, "--prompt", "one", "--template", "chatml", *SHORT).out == by_hand.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Give one of --prompt"),
        (("--prompt", "a", "--chat"), "Give one of --prompt"),
        (("--chat", "--out", "x.jsonl"), "--out does nothing with --chat"),
        (("--prompt", "one " * 300), "128 positions"),
        (("--prompt", ""), "The prompt is empty"),
        (("--chat",), "renders only single requests"),
        (("--prompt", "a", "--template", "other"), "template 'other' is unknown"),
        (("--prompt", "a", "--top-p", "0.5"), "--top-p does nothing"),
        (("--prompt", "a", "--adapter", "nowhere"), "neither a run's folder nor an adapter's"),
        (("--prompt", "a", "--out", "."), ".: is a folder"),
        (("--prompt", "a", "--out", "/dev/null/x.jsonl"), "/dev/null is not a folder"),
    ],
)
def test_mistakes_are_one_message(verb: Verb, tiny_base: Path, options: tuple[str, ...], message: str) -> None:
    outcome = verb("generate", tiny_base, *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_long_prompt_of_a_file_is_named(verb: Verb, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n" + "two " * 300 + "\n")
    outcome = verb("generate", tiny_base, "--file", tmp_path / "in.txt")
    assert outcome.code == 2
    assert "in.txt:2: the prompt has" in outcome.err


class Talk:
    """Reads scripted lines and keeps what the model was shown."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.shown: list[list[int]] = []

    def read(self, _: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def answer(self, _model: object, _tokenizer: object, ids: list[int], *_: object) -> Answer:
        self.shown.append(ids)
        return Answer(f"red{len(self.shown)}", True, 2)


def test_a_conversation_shows_what_was_said(tiny_base: Path) -> None:
    model = load_base(tiny_base, None, "float32", "cpu", quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = Template("short", "{{ messages[0].content }}:{% if first %}!{% endif %}")
    talk = Talk("one", "", "two", "/new", "three")
    chat(model, tokenizer, template, Sampling(8), talk.read, talk.answer)
    ids = {text: encode_texts([text], tokenizer)[0] for text in ("one:!", "red1", "two:", "three:!")}
    assert talk.shown == [
        ids["one:!"],
        [*ids["one:!"], *ids["red1"], tokenizer.eos_token_id, *ids["two:"]],
        ids["three:!"],
    ]


def test_a_long_conversation_forgets_its_beginning(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_base(tiny_base, None, "float32", "cpu", quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = Template("short", "{{ messages[0].content }}:")
    talk = Talk(*["one two three four five six"] * 12)
    chat(model, tokenizer, template, Sampling(20), talk.read, talk.answer)
    assert max(map(len, talk.shown)) <= 128 - 20
    assert talk.shown[-1][-3:] == talk.shown[0][-3:]
    assert "are left out: the model has 128 positions" in capsys.readouterr().err


def test_a_template_of_single_requests_is_refused(tiny_base: Path) -> None:
    model = load_base(tiny_base, None, "float32", "cpu", quiet=True)
    with pytest.raises(UserError, match="alpaca renders only single requests"):
        chat(model, AutoTokenizer.from_pretrained(tiny_base), Template.load("alpaca"), Sampling(), Talk("a").read)
