"""Mixing languages in an epoch: sampling by temperature, with a cap and a limit on repeats.

A language of n rows gets a share of the epoch proportional to n^(1/T). T = 1 leaves the data as it is; a larger T gives
small languages more. The epoch keeps its number of rows. An example with T = 2 and max_repeats 4:

    language   rows   weight n^(1/2)   planned              taken
    sw          100   10               1000 · 10/40 = 250   each row twice, and 50 rows a third time
    en          900   30               1000 · 30/40 = 750   750 of the 900 rows once

With max_repeats 2, sw may get only 200; the missing 50 rows are taken from en, which then gets 800.

The rows of the last, partial round are those with the smallest hashes of their tokens. So a seed always chooses the
same rows, and an added source only lengthens or shortens the choice of the other languages.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lola_ft.data.encoding import Encoded

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MixSettings:
    """The settings of the mix, as in a recipe.

    Attributes:
        temperature: T, at least 1.
        max_per_language: Most examples of a language in an epoch; None for no limit.
        max_repeats: Most times that a row is used in an epoch.
    """

    temperature: float = 1.0
    max_per_language: int | None = None
    max_repeats: int = 4


@dataclass
class LanguageShare:
    """One language in the mix: the sequences available, the number planned by the formula, and the number it got.

    Attributes:
        planned_tokens: Tokens of the planned sequences, at the language's average length.
    """

    available: int
    planned: float
    examples: int
    planned_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Mixed:
    """The sequences of an epoch."""

    dataset: "Dataset"
    languages: list[str]
    """Each sequence's language code."""
    shares: dict[str, LanguageShare]
    """Each language's share, by language code."""

    @property
    def changed(self) -> bool:
        """True unless the epoch has each sequence exactly once."""
        return any(share.examples != share.available for share in self.shares.values())

    @property
    def tokens(self) -> int:
        return sum(share.tokens for share in self.shares.values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the facts for the manifest: planned and actual examples and tokens, by language."""
        return {code: asdict(self.shares[code]) for code in sorted(self.shares)}


def plan(available: Mapping[str, int], settings: MixSettings) -> dict[str, LanguageShare]:
    """Compute the number of examples of each language.

    `planned` follows the formula. A language whose planned number exceeds a limit (the cap, or its rows times
    max_repeats) gets the limit, and the other languages share the excess in proportion. So the epoch stays as long as
    the data under the cap.

    Args:
        available: Number of sequences by language, all above 0.
    """
    cap = settings.max_per_language or math.inf
    # The epoch's length: all sequences, at most `cap` of a language.
    total = sum(min(count, cap) for count in available.values())
    # n^(1/T) per language, and the most that each language can give.
    weights = {code: count ** (1 / settings.temperature) for code, count in available.items()}
    limits = {code: min(cap, count * settings.max_repeats) for code, count in available.items()}
    # Divide the total by weight within the limits, and round so that the sum stays the total.
    whole = _whole_numbers(_fill(total, weights, limits), limits, int(total))
    # The formula's own numbers, without limits, for the report.
    planned = {code: total * weight / sum(weights.values()) for code, weight in weights.items()}
    return {code: LanguageShare(available[code], round(planned[code], 1), whole[code]) for code in available}


def mix(encoded: Encoded, settings: MixSettings, seed: int) -> Mixed:
    """Choose an epoch's sequences. Only their indices are copied."""
    shares = plan(Counter(encoded.languages), settings)
    chunks = encoded.dataset.data.column("input_ids").chunks
    # times (N,): how often each of the N sequences is used. lengths (N,): tokens per sequence.
    times = _times(encoded.languages, shares, chunks, seed)
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    # Count the tokens per language, in the data and in the mix.
    there_are = Counter[str]()
    for code, length, count in zip(encoded.languages, lengths.tolist(), times.tolist(), strict=True):
        there_are[code] += length
        shares[code].tokens += length * count
    for code, share in shares.items():
        share.planned_tokens = round(share.planned * there_are[code] / share.available)
    if (times == 1).all():
        return Mixed(encoded.dataset, encoded.languages, shares)
    # Round r has every sequence used more than r times: times [2, 0, 1] gives rounds [0, 2] and [0], chosen [0, 2, 0].
    rounds = [np.flatnonzero(times > done) for done in range(int(times.max()))]
    chosen = np.concatenate(rounds)
    return Mixed(encoded.dataset.select(chosen), [encoded.languages[place] for place in chosen.tolist()], shares)


def _fill(total: float, weights: dict[str, float], limits: dict[str, float]) -> dict[str, float]:
    """Divide a total in proportion to weights, each share at most its limit.

    Shares above their limit are set to it, and the remaining total is divided among the other languages, until no
    share exceeds its limit.
    """
    filled: dict[str, float] = {}
    free = dict(weights)
    while free:
        left = total - sum(filled.values())
        scale = left / sum(free.values())
        over = [code for code, weight in free.items() if weight * scale >= limits[code]]
        if not over:
            return filled | {code: weight * scale for code, weight in free.items()}
        for code in over:
            filled[code] = limits[code]
            del free[code]
    return filled


def _whole_numbers(shares: dict[str, float], limits: dict[str, float], total: int) -> dict[str, int]:
    """Round shares down, then add 1 to those with the largest remainders below their limit, up to the total."""
    whole = {code: math.floor(share + 1e-6) for code, share in shares.items()}
    by_remainder = sorted(shares, key=lambda code: (whole[code] - shares[code], code))
    for code in [code for code in by_remainder if whole[code] < limits[code]][: max(0, total - sum(whole.values()))]:
        whole[code] += 1
    return whole


def _times(languages: list[str], shares: dict[str, LanguageShare], chunks: list[Any], seed: int) -> np.ndarray:
    """Return how often each sequence is used (N,): the full rounds, plus 1 for those with the smallest hashes."""
    codes = np.array(languages)
    times = np.zeros(len(codes), dtype=np.int64)
    # Only languages with a partial round need hashes.
    left_over = {code for code, share in shares.items() if share.examples % share.available}
    hashes = _hashes(chunks, np.isin(codes, sorted(left_over)), seed)
    for code, share in shares.items():
        places = np.flatnonzero(codes == code)
        rounds, more = divmod(share.examples, share.available)  # 250 examples of 100 rows: 2 rounds and 50 more
        times[places] = rounds
        if more:
            order = sorted(places.tolist(), key=hashes.__getitem__)
            times[order[:more]] += 1
    return times


def _hashes(chunks: list[Any], wanted: np.ndarray, seed: int) -> dict[int, bytes]:
    """Return a hash of each wanted sequence's token ids, by the sequence's index."""
    hashes, place = dict[int, bytes](), 0
    for chunk in chunks:
        ids, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, end in pairwise(offsets.tolist()):
            if wanted[place]:
                key = seed.to_bytes(8, "big")
                hashes[place] = hashlib.blake2b(ids[start:end].tobytes(), digest_size=8, key=key).digest()
            place += 1
    return hashes
