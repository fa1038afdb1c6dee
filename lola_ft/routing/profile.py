"""A routing profile: how many tokens of each language every expert got; and the profile's file.

Shapes: L languages, M MoE layers, E experts, S sampled tokens of all languages, one language after another.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lola_ft.errors import UserError
from lola_ft.files import write_bytes
from lola_ft.routing.measures import shares

FORMAT = "lola_ft_routing/2"
_TENSORS = (
    *("counts_LME", "mean_probs_LME", "mean_gates_LME", "tokens_L", "bytes_L", "documents_L"),
    *("token_kinds_L", "token_ids", "token_counts", "choices_SM", "sampled_L"),
)


@dataclass(frozen=True)
class About:
    """The model and settings that a profile was made with.

    Attributes:
        model, kind: The model's name as the user gave it, and its kind: base, run, adapter or merged.
        base_fingerprint: Fingerprint of the base's weights.
        quantization: `nf4`, or `none` for an unquantised model.
        layers: The MoE layers' numbers among all layers.
        hidden_size, inner_size, vocab_size: Sizes of the model.
        max_length: Most tokens of the pieces that texts were cut into.
    """

    model: str
    kind: str
    base_fingerprint: str
    quantization: str
    layers: tuple[int, ...]
    hidden_size: int
    inner_size: int
    vocab_size: int
    max_length: int


@dataclass(frozen=True)
class Profile:
    """The experts that the real tokens of each language went to.

    Attributes:
        counts_LME: Tokens by expert, int64; a token with K choices counts for each of its K experts.
        mean_probs_LME: Mean router probability of each expert over the language's tokens, float32.
        mean_gates_LME: The same mean, with an expert's probability counted as 0 for tokens that did not go to it.
        tokens_L, bytes_L, documents_L: Amount read of each language, int64.
        token_kinds_L: Number of different token ids per language; `token_ids` and `token_counts` hold the ids and their
            counts, one language after another.
        choices_SM: The expert of each sampled token (the first tokens of a language), or (S, M, K) its K experts, the
            first choice first; `sampled_L` has the number of sampled tokens per language.
        sample_digests: Hash of the sampled tokens' ids, by language; equal hashes mean equal tokens.
    """

    about: About
    languages: tuple[str, ...]
    counts_LME: Tensor
    mean_probs_LME: Tensor
    mean_gates_LME: Tensor
    tokens_L: Tensor
    bytes_L: Tensor
    documents_L: Tensor
    token_kinds_L: Tensor
    token_ids: Tensor
    token_counts: Tensor
    choices_SM: Tensor
    sampled_L: Tensor
    sample_digests: tuple[str, ...]

    @property
    def shares(self) -> Tensor:
        """Each expert's share of a language's tokens in a layer (L, M, E); 1/E if the load is even."""
        return shares(self.counts_LME)

    @property
    def num_experts(self) -> int:
        return self.counts_LME.shape[-1]

    def choices(self, language: str) -> Tensor:
        """Return the experts of a language's sampled tokens, (tokens, M) or (tokens, M, K)."""
        return self.choices_SM.split(self.sampled_L.tolist())[self.languages.index(language)]

    def token_shares(self) -> Tensor:
        """Return the share of each token id per language (L, kinds), float64, without ids that no language uses."""
        used, places = self.token_ids.unique(return_inverse=True)
        rows = torch.repeat_interleave(torch.arange(len(self.languages)), self.token_kinds_L)
        histogram = torch.zeros(len(self.languages), len(used), dtype=torch.float64)
        histogram[rows, places] = self.token_counts.double()
        return shares(histogram)

    def of(self, languages: Sequence[str]) -> Tensor:
        """Return the indices of languages; raises UserError for a language that the profile does not have."""
        if missing := [language for language in languages if language not in self.languages]:
            known = ", ".join(self.languages[:20]) + ", …" * (len(self.languages) > 20)
            raise UserError(f"the profile has no language '{missing[0]}'. It has {known}.")
        return torch.tensor([self.languages.index(language) for language in languages])


def save_profile(profile: Profile, path: str | Path) -> Path:
    """Write a profile as one safetensors file, completely or not at all."""
    about = {name: getattr(profile.about, name) for name in About.__dataclass_fields__}
    about |= {"languages": profile.languages, "sample_digests": profile.sample_digests}
    metadata = {"format": FORMAT, "profile": json.dumps(about, ensure_ascii=False)}
    tensors = {name: getattr(profile, name).contiguous() for name in _TENSORS}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, save(tensors, metadata))
    return target


def read_profile(path: str | Path) -> Profile:
    """Read a profile; raises UserError if the file is missing, damaged or of another version."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file. `lola-ft routing profile MODEL --data FILES --out {file}` writes one.")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata: dict[str, str] = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a routing profile, or a damaged one ({error}). Run `lola-ft routing profile` again."
        ) from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "no routing profile")
        raise UserError(
            f"{file}: its format is '{found}'; this version reads {FORMAT}. Run `lola-ft routing profile` again."
        )
    if missing := [name for name in _TENSORS if name not in tensors]:
        raise UserError(f"{file}: damaged: tensor '{missing[0]}' is missing. Run `lola-ft routing profile` again.")
    record: dict[str, Any] = json.loads(metadata["profile"])
    languages, digests = tuple(record.pop("languages")), tuple(record.pop("sample_digests"))
    about = About(**record | {"layers": tuple(record["layers"])})
    return Profile(about=about, languages=languages, sample_digests=digests, **tensors)
