"""In a training step on a GPU, the host reads only the tensors that `docs/internals.md` lists.

A read makes the host wait until the GPU has done all its work, and cannot be part of a CUDA graph. The steps here use
tensors without values (torch's meta device), which cannot be read.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.masking_utils
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs Triton")

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.kernels import experts, loss, nf4_triton
from lola_ft.kernels.products import GroupedMatmuls
from lola_ft.kernels.triton_products import TritonProducts
from lola_ft.quantization import NF4Linear
from lola_ft.quantization.nf4 import NF4, nf4_code
from tests.conftest import make_base
from tests.families.moe import make_moe

_KERNELS = ("product", "to_rank", "outer")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"lola": make_base(root / "lola"), "qwen3_moe": make_moe(root / "qwen3_moe", "qwen3_moe")}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use torch's meta device as a GPU: code that asks for the device takes the GPU's path."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    nf4_code.cache_clear()
    yield
    nf4_code.cache_clear()


class Launches:
    """A stand-in for a Triton kernel, which checks that all tensors of a launch are on the meta device."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) for size in grid)
        return self._launch

    def _launch(self, *args: Any, **_: Any) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        assert tensors
        assert all(tensor.is_meta for tensor in tensors)
        self.count += 1


def to_meta(model: nn.Module) -> None:
    """Replace a model's tensors by tensors without values; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, NF4Linear):
            stored = module.stored()
            parts = (stored.packed, stored.absmax, stored.absmax2, stored.offset)
            module.load_quantized(NF4(*(torch.empty_like(part, device="meta") for part in parts)))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            if not parameter.is_meta:
                setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device="meta"))


def step(base: Path, checkpointing: bool) -> None:
    """Do one training step with LoRA, a trained router and the family's balancing loss."""
    model = lola_ft.load_base(base, "nf4", "bfloat16", "cpu", quiet=True)
    model = add_adapter(model, AdapterSettings(attention_rank=4, expert_rank=4, dropout=0.1, tune_router=True)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    to_meta(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.empty(2, 20, dtype=torch.int64, device="meta")
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=True)
    out = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True, output_router_logits=True)
    (out.loss + 0.01 * out.aux_loss).backward()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in trained)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["triton", "grouped"])
@pytest.mark.parametrize("kind", ["lola", "qwen3_moe"])
def test_a_training_step_reads_nothing_but_the_number_of_labels(
    kind: str,
    way: str,
    checkpointing: bool,
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches, counted = Launches(), []
    for name in _KERNELS:
        monkeypatch.setattr(nf4_triton, name, launches)
    products = TritonProducts(capability=(9, 0)) if way == "triton" else GroupedMatmuls()
    monkeypatch.setattr(experts, "choose_products", lambda *_: products)

    def all_rows(x_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        counted.append(labels_BS)
        return x_BSD[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten()

    monkeypatch.setattr(loss, "labelled_rows", all_rows)
    if kind != "lola":  # transformers' own models read whether rows are packed
        monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None)
    step(bases[kind], checkpointing)
    assert len(counted) == 1
    assert bool(launches.count) is (way == "triton")


def test_the_number_of_labels_is_read(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would notice a read."""
    monkeypatch.setattr(experts, "choose_products", lambda *_: GroupedMatmuls())
    with pytest.raises(NotImplementedError, match="nonzero"):
        step(bases["lola"], checkpointing=False)
