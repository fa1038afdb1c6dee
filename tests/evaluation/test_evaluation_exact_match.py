"""Exact match counts what it should, on a model whose answers are written down."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lola_ft.evaluation import best_constant_answer, exact_match_by_language
from tests.tiny import tiny_config

EOS, PAD = 5, 1


class Scripted(nn.Module):
    """Says for each prompt what its script says, by the prompt's real tokens; keeps what it was shown."""

    device = torch.device("cpu")
    config = tiny_config()

    def __init__(self, script: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.script = script
        self.batches: list[torch.Tensor] = []

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, **_: object
    ) -> torch.Tensor:
        self.batches.append(attention_mask)
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.bool(), strict=True):
            real = tuple(id_ for id_, keep in zip(ids, mask.tolist(), strict=True) if keep)
            answer = self.script[real][:max_new_tokens]
            rows.append(ids + answer + [PAD] * (max_new_tokens - len(answer)))
        return torch.tensor(rows)


@pytest.fixture
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_base)


def row(prompt: str, completion: str, language: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, "language": language}


def test_counts_right_wrong_and_unstopped(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        row("a:", " red", "sw"),
        row("a much longer prompt:", " red", "sw"),
        row("c:", " green", "ja"),
        row("d:", " red", "ja"),
        row("e:", " red", "yo"),
    ]
    answers = [" red", " blue", "green", " red red", " red"]
    script = {
        tuple(tokenizer(r["prompt"])["input_ids"]): tokenizer(answer)["input_ids"] + ([EOS] if i != 4 else [])
        for i, (r, answer) in enumerate(zip(rows, answers, strict=True))
    }
    model = Scripted(script)
    result = exact_match_by_language(model, tokenizer, rows, batch_size=2, max_new_tokens=12)
    assert dict(result.asked) == {"sw": 2, "ja": 2, "yo": 1}
    assert {language: result.right[language] for language in result.asked} == {"sw": 1, "ja": 1, "yo": 0}
    assert result.accuracy == 2 / 5
    assert result.accuracy_of("sw") == 1 / 2
    assert result.stopped == 4, "the last answer is right but never ends"
    assert result.stopped_share == 4 / 5
    assert result.most_confused(10) == [("red", "blue", 1), ("red", "red red", 1)]
    assert len(model.batches) == 3
    assert all(mask[:, -1].all() for mask in model.batches), "padding is on the left"


def test_batching_changes_no_answer(tiny_base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    rows, generated = [], []
    for prompt in ("one two", "three", "Jina langu ni", "red green blue one two three four"):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        generated.append(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=PAD)[0, ids.shape[1] :])
        rows.append(row(prompt, tokenizer.decode(generated[-1][:2]), "sw"))
    # A random model does not end its answers: let the third token that it says to the first prompt be the end.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(generated[0][2]))
    one = exact_match_by_language(model, tokenizer, rows, batch_size=1, max_new_tokens=6)
    four = exact_match_by_language(model, tokenizer, rows, batch_size=4, max_new_tokens=6)
    assert one == four
    assert one.right["sw"] >= 1


def test_the_best_constant_answer_is_the_most_frequent() -> None:
    rows = [row("x", " Thai", "th")] * 3 + [row("x", " Zulu", "zu")] * 2
    assert best_constant_answer(rows) == ("Thai", 3 / 5)
