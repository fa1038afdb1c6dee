"""Task `generate`: greedy answers under the model's template, measured by exact match, chrF and BLEU (sacrebleu)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from lola_ft.console import Console
from lola_ft.data import Example, PromptTemplate
from lola_ft.errors import DataError, UserError
from lola_ft.evaluation.bootstrap import Floats, Value, ratio
from lola_ft.evaluation.exact_match import is_exact
from lola_ft.evaluation.overlong_prompts import cut_prompt, find_overlong, languages_of, say_rows
from lola_ft.evaluation.task import Measure, Measured
from lola_ft.generation import Answer, Sampling, answer_in_order, check_room
from lola_ft.language_codes import short_code
from lola_ft.open_model import OpenModel, PromptReader

_BY_CHARACTER = ("ja", "th", "lo", "km", "my", "bo", "dz")
"""Languages written without spaces, in which BLEU counts characters as words. For Chinese sacrebleu has a rule."""
_CHINESE = ("zh", "yue", "wuu")


class GenerateTask:
    """The task that compares a model's answer with the row's answer (the last one of a conversation).

    Attributes:
        overlong: Policy for a row whose prompt leaves a model no position for an answer:
            error: raise an error before anything is answered.
            skip: leave the row out for all models.
            truncate: cut the prompt's beginning, as in training.
        too_long: Number of rows that are too long, by language.

    Raises:
        UserError: sacrebleu is not installed.
        DataError: A row has no prompt.
    """

    name = "generate"

    def __init__(
        self, examples: Sequence[Example], batch_size: int, max_new_tokens: int, overlong: str = "error"
    ) -> None:
        for example in examples:
            if example.prompt is None:
                raise DataError(f"{example.where}: a text has no prompt to answer. Use --task loss for texts.")
        self.examples, self.batch_size, self.sampling = examples, batch_size, Sampling(max_new_tokens)
        self.overlong, self.too_long = overlong, Counter[str]()
        self._list_rows()
        self.measures: Mapping[str, Measure] = {
            "exact_match": Measure("exact match", ratio, percent=True),
            "chrf": Measure("chrF", _score_of(_chrf()), digits=1),
            "bleu": Measure("BLEU", _score_of(_bleu("13a")), digits=1),
            "ended": Measure("ended by itself", ratio, percent=True),
        }

    def _list_rows(self) -> None:
        self.languages = [example.language for example in self.examples]
        self.places = [example.where for example in self.examples]

    def prepare(self, readers: Sequence[tuple[PromptReader, PromptTemplate]], console: Console) -> None:
        """Apply the policy to rows that are too long for at least one model, in the same way for all models.

        Raises:
            DataError: A row is too long under `error`, or no row is left.
        """
        found = find_overlong(self.examples, readers)
        if not found:
            return
        if self.overlong == "error":
            raise next(iter(found.values())).refused(len(found) - 1)
        self.too_long = languages_of(found)
        if self.overlong == "truncate":
            console.print(f"{len(found)} prompts are too long; their beginning is cut: {say_rows(found)}.")
            return
        self.examples = [example for place, example in enumerate(self.examples) if place not in found]
        self._list_rows()
        if not self.examples:
            raise DataError(f"--overlong skip: the prompts of all {len(found)} rows are too long. Shorten them.")
        console.print(f"{len(found)} rows are skipped because their prompts are too long: {say_rows(found)}.")

    def run(self, opened: OpenModel, template: PromptTemplate) -> Measured:
        """Answer every row. `prepare` must have been called before, for rows that are too long."""
        prompts = self._prompts(opened, template)
        end = template.end_of(opened.tokenizer)
        answers = answer_in_order(opened.model, opened.tokenizer, prompts, self.sampling, self.batch_size, end)
        pairs = list(zip(answers, self.examples, strict=True))
        parts = {
            "exact_match": [(is_exact(answer, example.completion), 1) for answer, example in pairs],
            "ended": [(answer.ended, 1) for answer in answers],
            "chrf": [_statistics(_chrf(), answer, example) for answer, example in pairs],
            "bleu": [_statistics(_bleu(_tokenizer(example.language)), answer, example) for answer, example in pairs],
        }
        written = [
            {"answer": answer.text, "ended": answer.ended, "reference": example.completion} for answer, example in pairs
        ]
        return Measured({name: np.array(part, dtype=np.float64) for name, part in parts.items()}, written)

    def _prompts(self, opened: OpenModel, template: PromptTemplate) -> list[list[int]]:
        """Return the token ids of every prompt, cut if it is too long and the policy is `truncate`."""
        positions, prompts = opened.sizes.positions, list[list[int]]()
        for example in self.examples:
            ids = template.prompt_ids(example, opened.tokenizer)
            if len(ids) >= positions and self.overlong == "truncate":
                [turns] = template.turns([example], opened.tokenizer)
                ids = cut_prompt(turns, positions, self.sampling)
            check_room(ids, positions, f"{example.where}: the prompt")
            prompts.append(ids)
        return prompts


def _tokenizer(language: str) -> str:
    """Return sacrebleu's name of the tokenizer with which BLEU splits a language into words."""
    code = short_code(language.lower())
    if code in _CHINESE:
        return "zh"
    return "char" if code in _BY_CHARACTER else "13a"


def _statistics(metric: Any, answer: Answer, example: Example) -> list[int]:
    """Return a row's contribution to a corpus score: counts of matching and possible n-grams."""
    [statistics] = metric._extract_corpus_statistics([answer.text.strip()], [[example.completion.strip()]])
    return statistics


def _score_of(metric: Any) -> Value:
    def value(sums: Floats) -> Floats:
        return np.array([metric._compute_score_from_stats([round(part) for part in row]).score for row in sums])

    return value


@cache
def _chrf() -> Any:
    return _sacrebleu().CHRF()


@cache
def _bleu(tokenize: str) -> Any:
    return _sacrebleu().BLEU(tokenize=tokenize)


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError(
            "--task generate measures chrF and BLEU with sacrebleu, which is not installed. "
            "Install it: pip install 'lola-ft[evaluate]' (or, in a checkout, -c constraints.txt -e '.[evaluate]')."
        ) from None
    return metrics
