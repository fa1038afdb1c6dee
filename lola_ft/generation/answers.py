"""Answers to prompts of token ids, in batches padded on the left, with a cache of keys and values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from lola_ft.console import shown_progress
from lola_ft.data.turns import eos_of
from lola_ft.errors import DataError, UserError
from lola_ft.families import architecture_of


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token.

    Attributes:
        max_new_tokens: Most tokens of an answer, including its end-of-text token.
        temperature: 0 always takes the likeliest token.
        top_p: Sample only among the likeliest tokens with this total probability.
        seed: Random seed; the same prompts in batches of the same size get the same answers.

    Raises:
        UserError: A number is out of its range, or would be ignored.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}; it must be 0 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be above 0 and at most 1.")
        given = [name for name, value in (("--top-p", self.top_p), ("--seed", self.seed)) if value is not None]
        if given and not self.temperature:
            raise UserError(f"{given[0]} does nothing at --temperature 0. Give a temperature, or leave it out.")

    def options(self) -> dict[str, Any]:
        """Return the settings as options of transformers' `generate`."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        text: The answer without the end-of-text token.
        ended: True if the model ended the answer by itself.
        tokens: Number of tokens, including the end-of-text token.
    """

    text: str
    ended: bool
    tokens: int


def check_room(ids: Sequence[int], positions: int, where: str = "The prompt") -> None:
    """Raise DataError for a prompt that leaves no position for an answer; the message begins with `where`."""
    if not ids:
        raise DataError(f"{where} is empty. Write something.")
    if len(ids) >= positions:
        raise DataError(
            f"{where} has {len(ids)} tokens, and the model has {positions} positions for prompt and answer together. "
            "Shorten it."
        )


def answer_one(
    model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, streamer: Any = None, end: int | None = None
) -> Answer:
    """Answer a prompt; the streamer receives each token at once. For `end` see `answer_all`."""
    _seed(sampling)
    return _answer_batch(model, tokenizer, [ids], sampling, streamer, end)[0]


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int = 32,
    end: int | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer prompts in batches of similar length; yields each prompt's index and answer as soon as it is done.

    Args:
        end: The token that ends a turn, if it is not the end-of-text token (which also ends an answer).
    """
    _seed(sampling)
    positions = architecture_of(model.config).sizes.positions
    for places in _batches(prompts, positions - sampling.max_new_tokens, batch_size):
        batch = [prompts[place] for place in places]
        yield from zip(places, _answer_batch(model, tokenizer, batch, sampling, end=end), strict=True)


def answer_in_order(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int = 32,
    end: int | None = None,
) -> list[Answer]:
    """Answer prompts as in `answer_all`, with a progress bar; returns the answers in the order of the prompts."""
    found = dict[int, Answer]()
    with shown_progress("Answering", len(prompts), "prompts") as advance:
        for place, answer in answer_all(model, tokenizer, prompts, sampling, batch_size, end):
            found[place] = answer
            advance(1)
    return [found[place] for place in range(len(prompts))]


def _batches(prompts: Sequence[list[int]], longest: int, batch_size: int) -> list[list[int]]:
    """Group prompts' places, shortest first; a prompt that leaves too little room for an answer gets its own batch."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    roomy = [place for place in order if len(prompts[place]) <= longest]
    single = [[place] for place in order if len(prompts[place]) > longest]
    return [roomy[start : start + batch_size] for start in range(0, len(roomy), batch_size)] + single


def _seed(sampling: Sampling) -> None:
    if sampling.temperature:
        torch.manual_seed(sampling.seed or 0)


@torch.no_grad()
def _answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    streamer: Any = None,
    end: int | None = None,
) -> list[Answer]:
    eos = eos_of(tokenizer)
    ends = [eos] if end in (None, eos) else [end, eos]
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    sizes = architecture_of(model.config).sizes
    for ids in prompts:
        check_room(ids, sizes.positions)
    unnamed = list(
        range(len(tokenizer), sizes.vocab)
    )  # embedding rows without a token, which only round the vocabulary up
    generated = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]).to(model.device),
        max_new_tokens=min(sampling.max_new_tokens, sizes.positions - width),
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        suppress_tokens=unnamed or None,
        streamer=streamer,
        **sampling.options(),
    )
    return [_answer(ids, tokenizer, ends) for ids in generated[:, width:].tolist()]


def _answer(ids: list[int], tokenizer: Any, ends: Sequence[Any]) -> Answer:
    said = list(takewhile(lambda token: token not in ends, ids))
    ended = len(said) < len(ids)
    text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text, ended, len(said) + ended)
