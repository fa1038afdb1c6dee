"""`torch.compile` of a model: the same numbers, with graph breaks only at functions that ask for them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.quantization import load_base

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_compiled_model_gives_the_same_loss_and_gradients(tiny_base: Path, quantization: str | None) -> None:
    base = load_base(tiny_base, quantization, "float32", torch.device("cpu"), quiet=True)
    model = add_adapter(base, AdapterSettings(attention_rank=4, mlp_rank=4, expert_rank=4)).train()
    ids = torch.randint(6, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    reasons = torch._dynamo.explain(loss_of)(model, ids).break_reasons
    assert reasons  # the experts are always left out
    assert all("torch.compiler.disable" in reason.reason for reason in reasons)
    torch._dynamo.reset()
    loss, gradients = step(torch.compile(model, backend="aot_eager"), model, ids)
    torch._dynamo.reset()
    wanted, wanted_gradients = step(model, model, ids)
    torch.testing.assert_close(loss, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], msg=name)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(runs: nn.Module, model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(runs, ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
