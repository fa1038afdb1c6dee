"""Experts whose 4-bit store is in host memory give the same numbers, bit for bit, as experts on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.planning import Job, predict
from lola_ft.quantization import NF4Experts
from lola_ft.quantization.offload import OffloadedExperts
from tests.conftest import make_base
from tests.families.moe import make_moe
from tests.simulated_device import SimulatedTransfers, simulate

IDS = torch.arange(6, 46).view(2, 20)
_KINDS = ("lola", "qwen3_moe")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LOLA's shape with three MoE layers, and a base with gated experts and several choices per token."""
    root = tmp_path_factory.mktemp("offload")
    return {
        "lola": make_base(root / "lola", n_layer=6),
        "qwen3_moe": make_moe(root / "qwen3_moe", "qwen3_moe", num_hidden_layers=5),
    }


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedTransfers]:
    """Simulated devices, one for each base that is loaded with experts in host memory."""
    return simulate(monkeypatch)


def load(folder: Path, kept: str | None) -> Any:
    return lola_ft.load_base(folder, "nf4", "float32", "cpu", quiet=True, offload=kept)


def step(model: Any, checkpointing: bool) -> list[Tensor]:
    """Return loss and gradients of two steps of a model with an adapter."""
    settings = AdapterSettings(attention_rank=4, expert_rank=4, dropout=0.0)
    torch.manual_seed(0)
    model = add_adapter(model, settings).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    outcome = []
    for _ in range(2):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        outcome += [loss.detach(), *torch.autograd.grad(loss, trained)]
    return outcome


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", _KINDS)
def test_losses_and_gradients_are_the_same(
    kind: str, checkpointing: bool, bases: dict[str, Path], device: list[SimulatedTransfers]
) -> None:
    expected = step(load(bases[kind], None), checkpointing)
    got = step(load(bases[kind], "experts"), checkpointing)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    (transfers,) = device
    layers = len(transfers.stores)
    up, down = list(range(2, layers)), list(reversed(range(layers - 2)))
    assert transfers.copied() == [0, 1, *up, *down, *up, *down]


@pytest.mark.parametrize("kind", _KINDS)
def test_generated_tokens_are_the_same(kind: str, bases: dict[str, Path], device: list[SimulatedTransfers]) -> None:
    def generate(model: Any) -> Tensor:
        return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=1)

    assert torch.equal(generate(load(bases[kind], "experts")), generate(load(bases[kind], None)))
    assert device


@pytest.mark.usefixtures("device")
def test_the_store_is_read_from_the_host(bases: dict[str, Path]) -> None:
    """Reading single weights, or the state, gives the layer's own values while another layer is on the device."""
    plain, kept = load(bases["lola"], None), load(bases["lola"], "experts")
    kept(IDS)
    state = kept.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for own, other in zip(experts_of(kept), experts_of(plain), strict=True):
        assert isinstance(own, OffloadedExperts)
        for part in own.parts:
            assert torch.equal(own.expert_weight(part, 2, torch.float32), other.expert_weight(part, 2, torch.float32))


def test_a_cache_is_loaded_to_the_host(bases: dict[str, Path], device: list[SimulatedTransfers]) -> None:
    cache = lola_ft.quantization.quantize_base(bases["lola"], "float32", quiet=True)
    assert torch.equal(load(cache, "experts")(IDS).logits, load(bases["lola"], None)(IDS).logits)
    assert len(device) == 1


def test_the_store_stays_where_it_is(bases: dict[str, Path], device: list[SimulatedTransfers]) -> None:
    model = load(bases["lola"], "experts")
    before = model(IDS).logits
    assert torch.equal(model.to("cpu").to(torch.float32)(IDS).logits, before)
    with pytest.raises(UserError, match="Load the base again"):
        experts_of(model)[0].to("meta")
    assert len(device) == 1


@pytest.mark.parametrize("kind", _KINDS)
def test_the_plan_has_both_sides(kind: str, bases: dict[str, Path], device: list[SimulatedTransfers]) -> None:
    model = load(bases[kind], "experts")
    job = Job(architecture_of(model.config), AdapterSettings(expert_rank=4), dtype="float32", offload=True)
    planned = predict(job).offloading
    assert planned is not None
    (transfers,) = device
    assert planned.host == sum(store.numel() for store in transfers.stores)
    assert planned.buffers == sum(buffer.numel() for buffer in transfers.buffers)
    without = predict(Job(job.architecture, job.settings, dtype="float32"))
    assert without.total - predict(job).total == planned.host - planned.buffers
    step(model, checkpointing=True)
    copied = [transfers.stores[layer].numel() for layer in transfers.copied()]
    first = sum(store.numel() for store in transfers.stores[:2])  # once, before the first pass
    assert 2 * planned.copied == sum(copied) - first


@pytest.mark.parametrize(
    ("kept", "quantization", "words"),
    [
        ("experts", "nf4", "no GPU"),
        ("experts", None, "quantization is none"),
        ("layers", "nf4", "'layers' is not known"),
    ],
)
def test_offloading_is_refused_without_gpu_or_4_bit(
    kept: str, quantization: str | None, words: str, bases: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=words):
        lola_ft.load_base(bases["lola"], quantization, "float32", "cpu", quiet=True, offload=kept)


def experts_of(model: Any) -> list[NF4Experts]:
    return [module for module in model.modules() if isinstance(module, NF4Experts)]
