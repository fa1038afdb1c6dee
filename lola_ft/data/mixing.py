"""Mix of languages in an epoch: sampling by temperature, with a cap and a limit on repeats.

With n rows in a language, its share is proportional to n^(1/T): T = 1 leaves the data as it is, a larger T gives small
languages more. An epoch keeps its size. Rows are chosen by a hash of their tokens, so that a seed always chooses the
same, and a source that is added only lengthens or shortens what is taken of the other languages.
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
    """Settings of the mix, as in a recipe.

    Attributes:
        temperature: T, at least 1.
        max_per_language: Most examples of a language in an epoch; None for no limit.
        max_repeats: How often a row may come in an epoch.
    """

    temperature: float = 1.0
    max_per_language: int | None = None
    max_repeats: int = 4


@dataclass
class LanguageShare:
    """One language in the mix: sequences it has, what is planned by the formula, what it got.

    Attributes:
        planned_tokens: Of the planned sequences, if they are as long as the language's are on average.
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
    """By language code."""

    @property
    def changed(self) -> bool:
        """Tell whether the epoch differs from each sequence once."""
        return any(share.examples != share.available for share in self.shares.values())

    @property
    def tokens(self) -> int:
        return sum(share.tokens for share in self.shares.values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """For the manifest: planned and actual examples and tokens, by language."""
        return {code: asdict(self.shares[code]) for code in sorted(self.shares)}


def plan(available: Mapping[str, int], settings: MixSettings) -> dict[str, LanguageShare]:
    """Examples of each language.

    `planned` follows the formula; where it passes a limit (the cap, or rows times repeats), the rest goes to the other
    languages in proportion, so that the epoch stays as long as the data under the cap.

    Args:
        available: Sequences by language, none of them 0.
    """
    cap = settings.max_per_language or math.inf
    total = sum(min(count, cap) for count in available.values())
    weights = {code: count ** (1 / settings.temperature) for code, count in available.items()}
    limits = {code: min(cap, count * settings.max_repeats) for code, count in available.items()}
    whole = _whole_numbers(_fill(total, weights, limits), limits, int(total))
    planned = {code: total * weight / sum(weights.values()) for code, weight in weights.items()}
    return {code: LanguageShare(available[code], round(planned[code], 1), whole[code]) for code in available}


def mix(encoded: Encoded, settings: MixSettings, seed: int) -> Mixed:
    """Choose an epoch's sequences; nothing is copied but their places."""
    shares = plan(Counter(encoded.languages), settings)
    chunks = encoded.dataset.data.column("input_ids").chunks
    times = _times(encoded.languages, shares, chunks, seed)
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    there_are = Counter[str]()
    for code, length, count in zip(encoded.languages, lengths.tolist(), times.tolist(), strict=True):
        there_are[code] += length
        shares[code].tokens += length * count
    for code, share in shares.items():
        share.planned_tokens = round(share.planned * there_are[code] / share.available)
    if (times == 1).all():
        return Mixed(encoded.dataset, encoded.languages, shares)
    rounds = [np.flatnonzero(times > done) for done in range(int(times.max()))]
    chosen = np.concatenate(rounds)
    return Mixed(encoded.dataset.select(chosen), [encoded.languages[place] for place in chosen.tolist()], shares)


def _fill(total: float, weights: dict[str, float], limits: dict[str, float]) -> dict[str, float]:
    """Divide a total by weights; what a limit cuts off is divided again among those below theirs."""
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
    """Round down, then give what is missing to the largest remainders that have room."""
    whole = {code: math.floor(share + 1e-6) for code, share in shares.items()}
    by_remainder = sorted(shares, key=lambda code: (whole[code] - shares[code], code))
    for code in [code for code in by_remainder if whole[code] < limits[code]][: max(0, total - sum(whole.values()))]:
        whole[code] += 1
    return whole


def _times(languages: list[str], shares: dict[str, LanguageShare], chunks: list[Any], seed: int) -> np.ndarray:
    """Return how often each sequence comes: a language's full rounds, plus one for the first in the order of hashes."""
    codes = np.array(languages)
    times = np.zeros(len(codes), dtype=np.int64)
    left_over = {code for code, share in shares.items() if share.examples % share.available}
    hashes = _hashes(chunks, np.isin(codes, sorted(left_over)), seed)
    for code, share in shares.items():
        places = np.flatnonzero(codes == code)
        rounds, more = divmod(share.examples, share.available)
        times[places] = rounds
        if more:
            order = sorted(places.tolist(), key=hashes.__getitem__)
            times[order[:more]] += 1
    return times


def _hashes(chunks: list[Any], wanted: np.ndarray, seed: int) -> dict[int, bytes]:
    """A hash of each wanted sequence's token ids, by its place."""
    hashes, place = dict[int, bytes](), 0
    for chunk in chunks:
        ids, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for start, end in pairwise(offsets.tolist()):
            if wanted[place]:
                key = seed.to_bytes(8, "big")
                hashes[place] = hashlib.blake2b(ids[start:end].tobytes(), digest_size=8, key=key).digest()
            place += 1
    return hashes
