"""A routing profile: which experts the tokens of each language went to, and its file.

Shapes: L languages, M MoE layers, E experts, S sampled tokens of all languages one after the other.
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
    """What a profile was made of.

    Attributes:
        model, kind: As the user named it, and base, run, adapter or merged.
        base_fingerprint: Of the base's weights.
        quantization: `nf4`, or `none` of a dense model.
        layers: The MoE layers' places among all layers.
        hidden_size, inner_size, vocab_size: Of the model.
        max_length: Texts were cut into pieces of as many tokens.
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
    """Where the real tokens of each language went.

    Attributes:
        counts_LME: Tokens by expert, int64; a token with K choices counts for each of K experts.
        mean_probs_LME: Mean of the router's probability of each expert over the language's tokens, float32.
        mean_gates_LME: The same, but counting an expert's probability only for the tokens that went to it.
        tokens_L, bytes_L, documents_L: What was read of each language, int64.
        token_kinds_L: How many different token ids a language has; the ids and how often each occurs stand in
            `token_ids` and `token_counts`, one language after the other.
        choices_SM: Expert of each of a language's first tokens, or (S, M, K) its experts, the first choice first;
            `sampled_L` says how many tokens these are.
        sample_digests: Hash of these tokens' ids, by language: equal digests, same tokens.
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
        """Each expert's share of a language's tokens in a layer; 1/E if the load is even."""
        return shares(self.counts_LME)

    @property
    def num_experts(self) -> int:
        return self.counts_LME.shape[-1]

    def choices(self, language: str) -> Tensor:
        """The sampled tokens' experts (tokens, M) or (tokens, M, K) of one language."""
        return self.choices_SM.split(self.sampled_L.tolist())[self.languages.index(language)]

    def token_shares(self) -> Tensor:
        """How often each token id is used (L, kinds), float64; ids that no language uses are left out."""
        used, places = self.token_ids.unique(return_inverse=True)
        rows = torch.repeat_interleave(torch.arange(len(self.languages)), self.token_kinds_L)
        histogram = torch.zeros(len(self.languages), len(used), dtype=torch.float64)
        histogram[rows, places] = self.token_counts.double()
        return shares(histogram)

    def of(self, languages: Sequence[str]) -> Tensor:
        """Return the places of languages, all of which the profile must have."""
        if missing := [language for language in languages if language not in self.languages]:
            known = ", ".join(self.languages[:20]) + ", …" * (len(self.languages) > 20)
            raise UserError(f"the profile has no language '{missing[0]}'. It has {known}.")
        return torch.tensor([self.languages.index(language) for language in languages])


def save_profile(profile: Profile, path: str | Path) -> Path:
    """Write a profile as one safetensors file, whole or not at all."""
    about = {name: getattr(profile.about, name) for name in About.__dataclass_fields__}
    about |= {"languages": profile.languages, "sample_digests": profile.sample_digests}
    metadata = {"format": FORMAT, "profile": json.dumps(about, ensure_ascii=False)}
    tensors = {name: getattr(profile, name).contiguous() for name in _TENSORS}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, save(tensors, metadata))
    return target


def read_profile(path: str | Path) -> Profile:
    """Read a profile; a missing file, or one that is no profile of this version, is refused."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file. `lola-ft routing profile MODEL --data FILES --out {file}` writes one.")
    try:
        with safe_open(file, framework="pt") as handle:
            metadata: dict[str, str] = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a routing profile, or a damaged one ({error}). Profile anew.") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "no routing profile")
        raise UserError(f"{file}: its format is '{found}'; this version reads {FORMAT}. Profile anew.")
    if missing := [name for name in _TENSORS if name not in tensors]:
        raise UserError(f"{file}: damaged: tensor '{missing[0]}' is missing. Profile anew.")
    record: dict[str, Any] = json.loads(metadata["profile"])
    languages, digests = tuple(record.pop("languages")), tuple(record.pop("sample_digests"))
    about = About(**record | {"layers": tuple(record["layers"])})
    return Profile(about=about, languages=languages, sample_digests=digests, **tensors)
