"""Answers do not depend on batching, end where they end, and prompts are those of training."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lola_ft.data import Example, Template, encode, encode_texts
from lola_ft.data.example import prompt_fields
from lola_ft.errors import DataError, UserError
from lola_ft.generation import Sampling, answer_all, answer_one
from lola_ft.generation.chat import TerminalStreamer
from lola_ft.generation.prompts import read_prompts, request
from lola_ft.quantization import load_base
from tests.conftest import make_base, write_rows

PROMPTS = ["one two", "three", "Jina langu ni", "red green blue one two three four five six seven"]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> torch.nn.Module:
    return load_base(tiny_base, None, "float32", "cpu", quiet=True)


@pytest.fixture
def tokenizer(tiny_base: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_base)


def test_an_answer_is_what_the_logits_say(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    [ids] = encode_texts(["one two"], tokenizer)
    said = list(ids)
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=torch.tensor([said]), use_cache=False).logits[0, -1]
            said.append(int(logits[: len(tokenizer)].argmax()))
    answer = answer_one(model, tokenizer, ids, Sampling(5))
    assert answer.text == tokenizer.decode(said[len(ids) :], skip_special_tokens=True)
    assert (answer.ended, answer.tokens) == (False, 5)


def test_batching_changes_no_answer(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    prompts = encode_texts(PROMPTS, tokenizer)
    alone = [answer_one(model, tokenizer, ids, Sampling(6)) for ids in prompts]
    together = dict(answer_all(model, tokenizer, prompts, Sampling(6), batch_size=3))
    assert [together[place] for place in range(4)] == alone


def test_a_prompt_with_little_room_does_not_shorten_the_others_answers(tiny_base: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = load_base(tiny_base, None, "float32", "cpu", quiet=True)
    prompts = [*encode_texts(["one two"], tokenizer), [5 + i % 9 for i in range(124)]]
    answers = dict(answer_all(model, tokenizer, prompts, Sampling(20), batch_size=2))
    assert (answers[0].tokens, answers[1].tokens) == (20, 4)


def test_an_answer_ends_at_the_end_of_text(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    [ids] = encode_texts(["one two"], tokenizer)
    free = answer_one(model, tokenizer, ids, Sampling(5))
    third = encode_texts([free.text], tokenizer)
    assert third
    said = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=1)[0, len(ids) :]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(said[2]))
    answer = answer_one(model, tokenizer, ids, Sampling(5))
    cut = said.tolist().index(int(said[2]))
    assert (answer.ended, answer.tokens) == (True, cut + 1)
    assert answer.text == tokenizer.decode(said[:cut], skip_special_tokens=True)


def test_sampling_is_seeded_and_limited(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    [ids] = encode_texts(["one two"], tokenizer)
    warm = [answer_one(model, tokenizer, ids, Sampling(8, 1.5, 0.9, seed)).text for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    greedy = answer_one(model, tokenizer, ids, Sampling(8)).text
    assert answer_one(model, tokenizer, ids, Sampling(8, 1.5, 1e-6, 3)).text == greedy


def test_ids_that_name_no_token_are_never_said(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", vocab_size=2000)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_base(base, None, "float32", "cpu", quiet=True)
    with torch.no_grad():
        model.transformer.wte.weight[len(tokenizer) :] *= 50
    [ids] = encode_texts(["one"], tokenizer)
    raw = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=1)[0, len(ids) :]
    assert raw.max() >= len(tokenizer), "the model wants to say an unnamed id"
    answer = answer_one(model, tokenizer, ids, Sampling(4))
    assert answer.text
    assert answer.tokens == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "above 0"),
        ({"top_p": 0.9}, "--top-p does nothing at --temperature 0"),
        ({"seed": 3}, "--seed does nothing"),
    ],
)
def test_wrong_sampling_options_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_a_conversation_is_tokenised_as_in_training(tokenizer) -> None:  # type: ignore[no-untyped-def]
    template = Template.load("chatml")
    turns = [prompt_fields(text) | {"messages": [{"role": "user", "content": text}]} for text in ("one", "two")]
    trained = encode([Example(turns[1], "green", "en", "here", ((turns[0], "red"),))], tokenizer, template, 512)
    ids = template.prompt_ids(request(turns[1], earlier=[(turns[0], "red")]), tokenizer)
    answer = [*encode_texts(["green"], tokenizer)[0], tokenizer.eos_token_id]
    assert [*ids, *answer] == trained.dataset[0]["input_ids"]


def test_text_is_streamed_by_whole_characters(tokenizer, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    text = "one ภาษา red\x1b[31m"
    streamer, steps = TerminalStreamer(tokenizer), []
    streamer.put(torch.tensor([[7, 8, 9]]))
    for token in encode_texts([text], tokenizer)[0]:
        streamer.put(torch.tensor([token]))
        steps.append(capsys.readouterr().out)
    streamer.end()
    steps.append(capsys.readouterr().out)
    assert "".join(steps) == "one ภาษา red\\x1b[31m\n"
    assert not any("\ufffd" in step for step in steps)
    assert sum(map(bool, steps)) > 8, "it comes in pieces"


def test_files_of_prompts_keep_their_rows_in_order(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "id": 7},
        {"instruction": "two", "input": "three"},
        {"messages": [{"role": "user", "content": "four"}]},
    ]
    asked = read_prompts(str(write_rows(tmp_path / "in.jsonl", rows)))
    assert [entry.example.prompt["prompt"] for entry in asked if entry.example.prompt] == [
        "one",
        "two\n\nthree",
        "four",
    ]
    assert [entry.row for entry in asked] == rows
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    assert [entry.row for entry in read_prompts(str(tmp_path / "in.txt"))] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "one"}, r"in\.jsonl:1: has no field prompt, instruction or messages \(found: question\)"),
        ({"prompt": ""}, r"in\.jsonl:1: field 'prompt' is empty"),
        ({"prompt": "one", "answer": "two"}, r"the answer would overwrite the field 'answer'"),
        ({"messages": [{"role": "assistant", "content": "four"}]}, "two assistant turns"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(str(write_rows(tmp_path / "in.jsonl", [row])))
