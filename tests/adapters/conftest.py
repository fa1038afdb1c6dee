"""A tiny base, loaded again for each use, and random adapters on every mix of groups."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.families import architecture_of
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.quantization import load_base

# Endings of Hub module names, by short names for tests.
TARGETS = {
    "c_attn": ".attn.c_attn",
    "attn_c_proj": ".attn.c_proj",
    "mlp_up": ".mlp.c_fc",
    "mlp_down": ".mlp.c_proj",
    "up": ".c_fc",
    "down": ".c_proj",
    "gate": ".moe.gate",
}


@pytest.fixture(scope="session")
def golden_adapter() -> Path:
    """The adapter that the authors' code and PEFT 0.11 wrote; read only."""
    return Path(__file__).parents[1] / "golden" / "adapter"


@pytest.fixture(scope="session")
def golden_base() -> Path:
    """The base of `golden_adapter`; read only."""
    return Path(__file__).parents[1] / "golden" / "base"


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Token ids (2, 32) that visit every expert of the tiny base."""
    return torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def fresh(tiny_base: Path) -> Callable[..., LolaForCausalLM]:
    """Load the tiny base again, because an adapter changes a model in place."""

    def load(quantization: str | None = None, dtype: str = "float32") -> LolaForCausalLM:
        return load_base(tiny_base, quantization=quantization, dtype=dtype, device="cpu", quiet=True)

    return load


@pytest.fixture(scope="session")
def tiny(tiny_base: Path) -> LolaConfig:
    """The tiny base's config."""
    return LolaConfig.from_pretrained(tiny_base)


@pytest.fixture(scope="session")
def make_weights(tiny: LolaConfig) -> Callable[..., AdapterWeights]:
    """Random adapters: `make_weights(c_attn=(4, 8.0), router=True)` gives rank 4 and alpha 8 to every c_attn."""

    def make(
        config: LolaConfig = tiny,
        router: bool = False,
        norms: bool = False,
        biases: bool = False,
        rslora: bool = False,
        dora: bool = False,
        only: Callable[[str], bool] = lambda _: True,
        **groups: tuple[int, float],
    ) -> AdapterWeights:
        weights = AdapterWeights(architecture_of(config), rslora=rslora)
        for name, place in weights.architecture.places.items():
            shape = place.shape
            module = name.removesuffix(".weight")
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if router and name.endswith("gate.weight") and only(module):
                weights.trained[name] = torch.randn(shape, generator=generator) * 0.3
            if norms and ".ln_" in name and only(module):
                weights.trained[name] = name.endswith("weight") + torch.randn(shape, generator=generator) * 0.1
            if biases and name.endswith(".bias") and only(module):
                weights.trained[name] = torch.randn(shape, generator=generator) * 0.1
            for group, (rank, alpha) in groups.items():
                expert = ".moe.experts." in module
                if module.endswith(TARGETS[group]) and only(module) and expert == (group in ("up", "down")):
                    inputs, outputs = reversed(shape) if group == "gate" else shape
                    a = torch.randn(rank, inputs, generator=generator) * 0.1
                    b = torch.randn(outputs, rank, generator=generator) * 0.1
                    lengths = 1 + torch.rand(outputs, generator=generator) if dora and not expert else None
                    weights.pairs[module] = LoraPair(a, b, alpha, lengths)
        assert weights.pairs or weights.trained
        return weights

    return make


@pytest.fixture
def everything(make_weights: Callable[..., AdapterWeights]) -> AdapterWeights:
    """An adapter on every target, all ranks different, and the router."""
    ranks = {"c_attn": 4, "attn_c_proj": 3, "mlp_up": 6, "mlp_down": 5, "up": 2, "down": 7}
    return make_weights(router=True, **{group: (rank, 3.0 + rank) for group, rank in ranks.items()})


@pytest.fixture
def same() -> Callable[[AdapterWeights, AdapterWeights], None]:
    """Assert that two adapters hold the same numbers, bit by bit."""

    def check(actual: AdapterWeights, expected: AdapterWeights) -> None:
        assert actual.pairs.keys() == expected.pairs.keys()
        assert actual.trained.keys() == expected.trained.keys()
        assert actual.rslora == expected.rslora
        for module, pair in expected.pairs.items():
            assert torch.equal(actual.pairs[module].a, pair.a), module
            assert torch.equal(actual.pairs[module].b, pair.b), module
            assert actual.pairs[module].alpha == pair.alpha, module
            lengths = actual.pairs[module].magnitude
            assert (lengths is None) == (pair.magnitude is None), module
            assert lengths is None or torch.equal(lengths, pair.magnitude), module
        for name, tensor in expected.trained.items():
            assert torch.equal(actual.trained[name], tensor), name

    return check
