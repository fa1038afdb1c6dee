"""The differences in routing between two profiles, such as a base's and its adapter's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lola_ft.errors import UserError
from lola_ft.routing.measures import flip_rate, jensen_shannon
from lola_ft.routing.profile import Profile


@dataclass(frozen=True)
class Drift:
    """The changes from a first profile to a second.

    Attributes:
        layers: The MoE layers' numbers among all layers.
        languages: The languages that both profiles have.
        divergence_LM: Jensen-Shannon divergence of each language's shares by layer, in bits.
        flips: Per language the share of its sampled tokens that go to another expert, by layer (M,); None if the two
            profiles did not sample the same tokens.
        left_out: Languages that only one profile has.
        quantizations: The quantisation of each of the two models.
    """

    layers: tuple[int, ...]
    languages: tuple[str, ...]
    divergence_LM: Tensor
    flips: dict[str, Tensor | None]
    left_out: tuple[str, ...]
    quantizations: tuple[str, str]


def compare(first: Profile, second: Profile) -> Drift:
    """Compare two profiles; raises UserError unless layers and experts are the same and a language is in both."""
    if (first.about.layers, first.num_experts) != (second.about.layers, second.num_experts):
        raise UserError(
            f"{first.about.model} has {len(first.about.layers)} MoE layers of {first.num_experts} experts, "
            f"{second.about.model} {len(second.about.layers)} of {second.num_experts}: they cannot be compared."
        )
    common = tuple(language for language in first.languages if language in second.languages)
    if not common:
        languages = (", ".join(profile.languages[:5]) for profile in (first, second))
        raise UserError(f"no language is in both profiles: {' against '.join(languages)}.")
    shares = [profile.shares[profile.of(common)] for profile in (first, second)]
    return Drift(
        first.about.layers,
        common,
        jensen_shannon(*shares),
        {language: _flips(first, second, language) for language in common},
        tuple(sorted({*first.languages, *second.languages} - set(common))),
        (first.about.quantization, second.about.quantization),
    )


def _flips(first: Profile, second: Profile, language: str) -> Tensor | None:
    digests = {profile.sample_digests[profile.languages.index(language)] for profile in (first, second)}
    chosen = [profile.choices(language) for profile in (first, second)]
    if len(digests) > 1 or not len(chosen[0]):
        return None
    # a profile with one choice per token has no dimension of choices
    one = chosen[0].ndim == 2
    return flip_rate(*(choices.to(torch.int16)[..., None] if one else choices.to(torch.int16) for choices in chosen))
