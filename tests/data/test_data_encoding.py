"""Token ids and labels: what is learned, what is masked, what happens to rows that are too long."""

from collections.abc import Iterator
from typing import Any

import pytest

from lola_ft.data import Example, Template, encode, encode_texts
from lola_ft.data.encoding import MASKED
from lola_ft.data.example import prompt_fields
from lola_ft.errors import DataError

EOS = 5


def answer(prompt: str, completion: str, language: str = "sw", where: str = "sw.jsonl:1") -> Example:
    return Example(prompt_fields(prompt), completion, language, where)


def text(content: str, language: str = "sw") -> Example:
    return Example(None, content, language, "sw.txt:1")


@pytest.fixture(scope="module")
def plain() -> Template:
    return Template.load("plain")


def columns(encoded: Any) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in encoded.dataset]


def test_an_answer_and_its_eos_are_learned_and_the_prompt_is_not(tokenizer: Any) -> None:
    template = Template.load("alpaca")
    example = answer("one two", "three")
    encoded = encode([example], tokenizer, template, 500)
    [(ids, labels)] = columns(encoded)
    prompt = encode_texts(template.render(example), tokenizer)[0]
    assert encoded.dataset.column_names == ["input_ids", "labels"]
    assert ids[: len(prompt)] == prompt  # what the model sees at inference
    assert labels == [MASKED] * len(prompt) + encode_texts(["three"], tokenizer)[0] + [EOS]
    assert tokenizer.decode(ids[:-1]) == template.render(example)[0] + "three"
    assert [id for id, label in zip(ids, labels, strict=True) if label != MASKED] == labels[len(prompt) :]


def test_a_text_is_learned_from_its_second_token_on(tokenizer: Any, plain: Template) -> None:
    [(ids, labels)] = columns(encode([text("one two three")], tokenizer, plain, 500))
    assert ids == [*encode_texts(["one two three"], tokenizer)[0], EOS]
    assert labels == [MASKED, *ids[1:]]


def test_special_tokens_in_a_text_are_plain_characters(tokenizer: Any, plain: Template) -> None:
    [(ids, _)] = columns(encode([answer("<s>one</s>", "two<|endoftext|>")], tokenizer, plain, 500))
    assert ids.count(EOS) == 1
    assert not {0, 1, 2, 3, 4} & set(ids)
    assert tokenizer.decode(ids[:-1]) == "<s>one</s>two<|endoftext|>"


def test_the_prompts_ids_do_not_depend_on_the_answer(tokenizer: Any, plain: Template) -> None:
    """'on' + 'e' would be one token in one piece."""
    assert len(encode_texts(["one"], tokenizer)[0]) < 3
    encoded = encode([answer("on", "e"), answer("on", " two")], tokenizer, plain, 500)
    [(first, _), (second, _)] = columns(encoded)
    prompt = encode_texts(["on"], tokenizer)[0]
    assert first[: len(prompt)] == second[: len(prompt)] == prompt


def test_a_generator_over_several_batches_keeps_order_and_counts(
    tokenizer: Any, plain: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lola_ft.data.encoding._BATCH", 3)
    numbers = ["one", "two", "three", "four", "five", "six", "seven"]

    def examples() -> Iterator[Example]:
        for index, number in enumerate(numbers):
            yield text(number, "sw") if index % 2 else answer("ten", number, "de")

    encoded = encode(examples(), tokenizer, plain, 500)
    learned = [[label for label in labels if label != MASKED] for _, labels in columns(encoded)]
    assert all(labels[-1] == EOS for labels in learned)
    assert [tokenizer.decode(ids[:-1]).removeprefix("ten") for ids, _ in columns(encoded)] == numbers
    assert {code: counts.rows for code, counts in encoded.report.languages.items()} == {"de": 4, "sw": 3}
    total = encoded.report.total
    assert (total.rows, total.kept, total.sequences) == (7, 7, len(encoded.dataset))
    assert total.tokens == sum(len(ids) for ids, _ in columns(encoded))
    assert total.trained_tokens == sum(map(len, learned))


def test_the_report_is_plain_data_sorted_by_language(tokenizer: Any, plain: Template) -> None:
    report = encode([text("one", "sw"), text("one", "de")], tokenizer, plain, 500).report.as_dict()
    assert list(report) == ["total", "languages"]
    assert list(report["languages"]) == ["de", "sw"]
    length = len(encode_texts(["one"], tokenizer)[0]) + 1
    assert report["languages"]["de"] == {
        "rows": 1,
        "kept": 1,
        "dropped": 0,
        "split": 0,
        "truncated": 0,
        "answers_cut": 0,
        "exchanges_cut": 0,
        "sequences": 1,
        "tokens": length,
        "trained_tokens": length - 1,
        "answer_tokens": length - 1,
        "answer_bytes": 3,
        "answer_words": 1,
        "tokens_per_byte": round((length - 1) / 3, 3),
        "tokens_per_word": length - 1,
    }


def test_the_dataset_is_deterministic_and_leaves_no_file(tokenizer: Any, plain: Template) -> None:
    first, second, other = (
        encode([answer("one", completion)], tokenizer, plain, 500).dataset for completion in ("two", "two", "six")
    )
    assert first._fingerprint == second._fingerprint != other._fingerprint
    assert first.cache_files == []
    assert str(first.features["input_ids"]) == "List(Value('int32'))"


def test_overlong_rows_are_dropped_and_counted_by_language(tokenizer: Any, plain: Template) -> None:
    long = "one two three four five six"
    encoded = encode([answer("one", "two", "de"), answer("one", long), text(long)], tokenizer, plain, 4, "drop")
    assert len(encoded.dataset) == 1
    assert encoded.report.languages["sw"].dropped == 2
    assert encoded.report.languages["sw"].tokens == 0
    assert encoded.report.total.rows == 3
    assert encoded.report.total.kept == 1


def test_a_row_of_exactly_max_length_is_kept(tokenizer: Any, plain: Template) -> None:
    row = answer("one two", "three")
    length = len(columns(encode([row], tokenizer, plain, 500))[0][0])
    assert len(encode([row], tokenizer, plain, length, "error").dataset) == 1
    with pytest.raises(DataError) as caught:
        encode([row], tokenizer, plain, length - 1, "error")
    assert str(caught.value) == (
        f"sw.jsonl:1: {length} tokens, more than data.max_length {length - 1}. Shorten the row, raise "
        "data.max_length, or set data.overlong to drop or truncate."
    )


def test_truncate_cuts_the_prompts_beginning_and_keeps_answer_and_eos(tokenizer: Any, plain: Template) -> None:
    row = answer("one two three four", " five six")
    [(whole, labels)] = columns(encode([row], tokenizer, plain, 500))
    learned = [label for label in labels if label != MASKED]
    for length in range(len(learned), len(whole)):
        encoded = encode([row], tokenizer, plain, length, "truncate")
        [(ids, cut)] = columns(encoded)
        assert ids == whole[-length:]
        assert [label for label in cut if label != MASKED] == (learned if length > len(learned) else learned[1:])
        assert (encoded.report.total.truncated, encoded.report.total.answers_cut) == (1, 0)


@pytest.mark.parametrize("example", [answer("ten", "one two three four five six"), text("one two three four five six")])
def test_truncate_cuts_an_answers_end_only_when_it_must_and_says_so(
    tokenizer: Any, plain: Template, example: Example
) -> None:
    encoded = encode([example], tokenizer, plain, 4, "truncate")
    [(ids, labels)] = columns(encoded)
    assert ids == [*encode_texts([example.completion], tokenizer)[0][:3], EOS]
    assert labels == [MASKED, *ids[1:]]
    assert (encoded.report.total.truncated, encoded.report.total.answers_cut) == (1, 1)


def test_split_learns_every_token_of_a_text_once(tokenizer: Any, plain: Template) -> None:
    row = text("one two three four five six seven")
    [(whole, _)] = columns(encode([row], tokenizer, plain, 500))
    for length in range(2, len(whole) + 1):
        encoded = encode([row], tokenizer, plain, length, "split")
        pieces = columns(encoded)
        assert all(2 <= len(ids) <= length for ids, _ in pieces)
        learned = [label for _, labels in pieces for label in labels if label != MASKED]
        assert learned == whole[1:]
        assert learned[-1] == EOS
        assert encoded.report.total.sequences == len(pieces)
        assert encoded.report.total.split == (len(pieces) > 1)


def test_split_refuses_a_row_with_a_prompt_and_says_why(tokenizer: Any, plain: Template) -> None:
    with pytest.raises(DataError) as caught:
        encode([answer("one", "two three four")], tokenizer, plain, 3, "split")
    assert str(caught.value).endswith(
        "and data.overlong split cuts plain text only: an answer cut off from its prompt teaches nothing. "
        "Choose drop or truncate."
    )


def test_nothing_to_encode_and_nothing_left_are_errors(tokenizer: Any, plain: Template) -> None:
    with pytest.raises(DataError, match="there are no rows to encode"):
        encode([], tokenizer, plain, 500)
    length = len(encode_texts(["one two three"], tokenizer)[0]) + 1
    with pytest.raises(DataError) as caught:
        encode([text("one two three"), text("one two three four five")], tokenizer, plain, 3)
    assert str(caught.value) == (
        f"none of the 2 rows is left: the shortest has {length} tokens, and data.max_length is 3. "
        "Set data.overlong to split, which learns all of a long text in pieces."
    )
    with pytest.raises(DataError, match=r"Raise data.max_length, or set data.overlong to truncate\.$"):
        encode([text("one two three four"), answer("one two three four", "five")], tokenizer, plain, 3)
    with pytest.raises(DataError, match=r"or set data.overlong to split\.$"):
        encode([text("one two three four")], tokenizer, plain, 3, "error")


def test_a_tokenizer_without_eos_is_refused(tokenizer: Any, plain: Template) -> None:
    from transformers import PreTrainedTokenizerFast

    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="the tokenizer has no EOS token, so answers would never end"):
        encode([text("one")], without, plain, 500)
