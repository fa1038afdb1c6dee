"""Scores of tokens equal plain computations by hand, for every batch size, padding and window."""

from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lola_ft.data import Example, Template, encode, encode_texts
from lola_ft.data.encoding import MASKED, Sequence
from lola_ft.data.example import prompt_fields
from lola_ft.errors import UserError
from lola_ft.evaluation.choice_task import ChoiceTask, Question
from lola_ft.evaluation.loss_task import LossTask
from lola_ft.evaluation.scoring import score, windows
from lola_ft.kernels import loss as kernel
from lola_ft.open_model import OpenModel, open_model

TEXTS = ["one two three", "Jina langu ni Amina", "ภาษา", "red", "green blue one two three four five six seven eight"]
PLAIN = Template.load("plain")


@pytest.fixture(scope="module")
def opened(tiny_base: Path) -> OpenModel:
    return open_model(tiny_base, quantization="none", dtype="float32", device="cpu")


def by_hand(model: Any, ids: list[int]) -> np.ndarray:
    """Minus log-softmax of each token but the first, from the full logits of one document."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


def text(words: str, language: str = "en") -> Example:
    return Example(None, words, language, f"rows:{words[:3]}")


def whole(ids: list[int]) -> Sequence:
    return Sequence(ids, [MASKED, *ids[1:]])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_equal_a_plain_computation_whatever_the_batch(opened: OpenModel, batch_size: int) -> None:
    sequences = [whole([*ids, 5]) for ids in encode_texts(TEXTS, opened.tokenizer)]
    found = score(opened.model, sequences, batch_size)
    for tokens, own in zip(sequences, found, strict=True):
        np.testing.assert_allclose(own, by_hand(opened.model, tokens.ids), rtol=1e-5, atol=1e-5)


def test_only_labels_are_scored_and_chunks_of_rows_change_nothing(
    opened: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encode_texts([TEXTS[4]], opened.tokenizer)[0]
    labels = [MASKED if place % 3 else token for place, token in enumerate(ids)]
    labels[0] = MASKED
    [all_at_once] = score(opened.model, [Sequence(ids, labels)])
    wanted = by_hand(opened.model, ids)[[place - 1 for place, label in enumerate(labels) if label != MASKED]]
    np.testing.assert_allclose(all_at_once, wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(kernel, "_CHUNK_ROWS", 2)
    np.testing.assert_allclose(score(opened.model, [Sequence(ids, labels)])[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "size", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (40, 8, 4), (41, 8, 3), (9, 8, 7)]
)
def test_windows_score_each_token_once_with_enough_context(length: int, size: int, stride: int) -> None:
    found = list(windows(length, size, stride))
    scored = [token for window in found for token in range(window.scored, window.end)]
    assert scored == list(range(1, length))
    assert all(window.end - window.begin <= size for window in found)
    assert all(window.scored - window.begin >= size - stride for window in found[1:])
    assert all(window.end - window.begin == size for window in found[1:]), "as much context as fits"


def test_a_long_text_is_scored_in_windows(opened: OpenModel) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 300, (200,), generator=generator).tolist()
    [found] = score(opened.model, [whole(ids)], stride=50)
    wanted = [by_hand(opened.model, ids[:128])]
    wanted += [by_hand(opened.model, ids[50:178])[-50:], by_hand(opened.model, ids[72:200])[-22:]]
    np.testing.assert_allclose(found, np.concatenate(wanted), rtol=1e-5, atol=1e-5)


def test_a_stride_changes_nothing_for_a_text_that_fits(opened: OpenModel) -> None:
    [ids] = encode_texts([TEXTS[4]], opened.tokenizer)
    assert np.array_equal(score(opened.model, [whole(ids)])[0], score(opened.model, [whole(ids)], stride=1)[0])


def test_bits_per_byte_of_a_text_leave_out_its_first_token(opened: OpenModel) -> None:
    result = LossTask([text(words) for words in TEXTS], batch_size=2).run(opened, PLAIN)
    for words, bits, loss in zip(TEXTS, result.parts["bits_per_byte"], result.parts["loss"], strict=True):
        [ids] = encode_texts([words], opened.tokenizer)
        nats = by_hand(opened.model, [*ids, opened.tokenizer.eos_token_id])
        first = len(opened.tokenizer.convert_ids_to_tokens(ids[0]))
        assert bits == pytest.approx([nats[:-1].sum() / log(2), len(words.encode()) - first], rel=1e-5)
        assert loss == pytest.approx([nats.sum(), len(ids)], rel=1e-5)


def test_bits_per_byte_of_answers_leave_out_their_end(opened: OpenModel) -> None:
    template = Template.load("alpaca")
    fields = prompt_fields("Say")
    rows = [Example(fields, "red blue", "en", "a"), Example(fields, "ภาษา", "th", "b", ((fields, "one"),))]
    chat = Template.load("chatml")
    for example, used in zip(rows, (template, chat), strict=True):
        result = LossTask([example], batch_size=2).run(opened, used)
        encoded = encode([example], opened.tokenizer, used, 128).dataset[0]
        labels = torch.tensor([encoded["labels"]])
        with torch.no_grad():
            trained = opened.model(torch.tensor([encoded["input_ids"]]), labels=labels).loss
        (nats, tokens), (bits, size) = result.parts["loss"][0], result.parts["bits_per_byte"][0]
        assert nats / tokens == pytest.approx(float(trained), rel=1e-5), "the loss is training's"
        answers = [answer for _, answer in example.exchanges]
        assert size == sum(len(answer.encode()) for answer in answers)
        assert tokens == sum(len(ids) + 1 for ids in encode_texts(answers, opened.tokenizer))
        costs = by_hand(opened.model, encoded["input_ids"])
        words = [place - 1 for place, label in enumerate(encoded["labels"]) if label not in (MASKED, 5)]
        assert bits == pytest.approx(costs[words].sum() / log(2), rel=1e-5)


def test_batch_size_changes_no_bits(opened: OpenModel) -> None:
    rows = [text(words * times) for words in TEXTS for times in (1, 9)]
    one, seven = (LossTask(rows, batch_size=size).run(opened, PLAIN).parts["bits_per_byte"] for size in (1, 7))
    np.testing.assert_allclose(one, seven, rtol=1e-5)


def test_a_tokenizer_that_changes_bytes_is_refused(opened: OpenModel, tiny_base: Path) -> None:
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("o", "oo")
    changed = OpenModel(opened.subject, opened.model, tokenizer, None, "")
    with pytest.raises(UserError, match="rows:one: the tokenizer turns a text of 13 bytes into 15 bytes"):
        LossTask([text(TEXTS[0])], 1).run(changed, PLAIN)


def test_a_stride_without_context_is_refused(opened: OpenModel) -> None:
    with pytest.raises(UserError, match="between 1 and 127"):
        LossTask([text("one")], 1, stride=128).run(opened, PLAIN)


def test_choices_are_compared_by_their_likelihood(opened: OpenModel) -> None:
    choices = ("red", "green blue one two", "ภาษา")
    questions = [
        Question(Example(prompt_fields(ask), choices[right], "en", "a"), choices, right)
        for right, ask in enumerate(("one", "two three", "Jina"))
    ]
    found = ChoiceTask(questions, batch_size=4).run(opened, PLAIN)
    for question, row in zip(questions, found.rows, strict=True):
        assert question.example.prompt
        [prompt] = encode_texts([question.example.prompt["prompt"]], opened.tokenizer)
        wanted = [
            -by_hand(opened.model, prompt + ids)[len(prompt) - 1 :].sum()
            for ids in encode_texts(list(choices), opened.tokenizer)
        ]
        assert row["log_likelihoods"] == pytest.approx(wanted, rel=1e-5)
        assert row["taken"] == int(np.argmax(wanted))
        per_byte = np.divide(wanted, [len(choice.encode()) for choice in choices])
        assert row["taken_per_byte"] == int(np.argmax(per_byte))
    right = [row["taken"] == row["right"] for row in found.rows]
    assert found.parts["accuracy"].tolist() == [[float(one), 1.0] for one in right]
    assert found.parts["chance"][:, 0] == pytest.approx(1 / 3)
