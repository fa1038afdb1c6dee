"""Task `generate`: greedy answers under the model's template, by exact match, chrF and BLEU (sacrebleu)."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from lola_ft.data import Example, PromptTemplate
from lola_ft.errors import DataError, UserError
from lola_ft.evaluation.bootstrap import Floats, Value, ratio
from lola_ft.evaluation.exact_match import is_exact
from lola_ft.evaluation.task import Measure, Measured
from lola_ft.generation import Answer, Sampling, answer_all, check_room
from lola_ft.language_codes import short_code
from lola_ft.open_model import OpenModel

_BY_CHARACTER = ("ja", "th", "lo", "km", "my", "bo", "dz")
"""Languages written without spaces: BLEU counts characters as words there, and words of Chinese by sacrebleu's rule."""
_CHINESE = ("zh", "yue", "wuu")


class GenerateTask:
    """Lets the model answer and compares with the row's answer, the last one of a conversation.

    Raises:
        UserError: sacrebleu is not installed.
        DataError: A row without a prompt.
    """

    name = "generate"

    def __init__(self, examples: Sequence[Example], batch_size: int, max_new_tokens: int) -> None:
        for example in examples:
            if example.prompt is None:
                raise DataError(f"{example.where}: a text has no prompt to answer. Use --task loss for texts.")
        self.examples, self.batch_size, self.sampling = examples, batch_size, Sampling(max_new_tokens)
        self.languages = [example.language for example in examples]
        self.places = [example.where for example in examples]
        self.measures: Mapping[str, Measure] = {
            "exact_match": Measure("exact match", ratio, percent=True),
            "chrf": Measure("chrF", _score_of(_chrf()), digits=1),
            "bleu": Measure("BLEU", _score_of(_bleu("13a")), digits=1),
            "ended": Measure("ended by itself", ratio, percent=True),
        }

    def run(self, opened: OpenModel, template: PromptTemplate) -> Measured:
        """Answer every row; raises DataError for a prompt too long for the model."""
        prompts = [template.prompt_ids(example, opened.tokenizer) for example in self.examples]
        for example, ids in zip(self.examples, prompts, strict=True):
            check_room(ids, opened.sizes.positions, f"{example.where}: the prompt")
        end = template.end_of(opened.tokenizer)
        found = dict(answer_all(opened.model, opened.tokenizer, prompts, self.sampling, self.batch_size, end))
        answers = [found[place] for place in range(len(prompts))]
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


def _tokenizer(language: str) -> str:
    """sacrebleu's name of the way in which BLEU cuts a language into words."""
    code = short_code(language.lower())
    if code in _CHINESE:
        return "zh"
    return "char" if code in _BY_CHARACTER else "13a"


def _statistics(metric: Any, answer: Answer, example: Example) -> list[int]:
    """Return a row's part of a corpus score: counts of matching and possible n-grams."""
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
