"""On a GPU numbers are those of the CPU, within the card's rounding, and memory stays small."""

from pathlib import Path

import pytest
import torch

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.cli import main
from tests.conftest import make_base

pytestmark = pytest.mark.gpu
# A GPU sums in another order and may use TF32 in places; logits of the tiny base are of size 1 to 5.
GPU_TOLERANCE = 5e-3
IDS = torch.arange(6, 46).view(2, 20)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_logits_and_gradients_equal_the_cpus(quantization: str | None, tiny_base: Path) -> None:
    outcome = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        base = lola_ft.load_base(tiny_base, quantization, "float32", device, quiet=True)
        model = add_adapter(base, AdapterSettings(attention_rank=4, mlp_rank=4, expert_rank=4, tune_router=True))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(device)
        ids = IDS.to(device)
        out = model(ids, labels=ids)
        out.loss.backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        outcome[device] = (out.logits.detach().cpu(), grads)
    torch.testing.assert_close(outcome["cuda"][0], outcome["cpu"][0], atol=GPU_TOLERANCE, rtol=GPU_TOLERANCE)
    assert set(outcome["cuda"][1]) == set(outcome["cpu"][1])
    for name, grad in outcome["cpu"][1].items():
        torch.testing.assert_close(outcome["cuda"][1][name], grad, atol=GPU_TOLERANCE, rtol=GPU_TOLERANCE)


def test_four_bit_weights_move_between_devices(tiny_base: Path) -> None:
    model = lola_ft.load_base(tiny_base, "nf4", "float32", "cpu", quiet=True)
    before = model(IDS).logits
    there = model.to("cuda")(IDS.to("cuda")).logits.cpu()
    torch.testing.assert_close(there, before, atol=GPU_TOLERANCE, rtol=GPU_TOLERANCE)
    assert torch.equal(model.to("cpu")(IDS).logits, before)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_experts_in_host_memory_give_the_same_numbers(checkpointing: bool, tmp_path: Path) -> None:
    """Of six MoE layers, two are on the GPU at a time. A copy that is too early or too late would change the loss."""
    base = make_base(tmp_path / "base", n_layer=12)
    outcome = {}
    for kept in ("experts", None):
        torch.manual_seed(0)
        loaded = lola_ft.load_base(base, "nf4", "float32", "cuda", quiet=True, offload=kept)
        model = add_adapter(loaded, AdapterSettings(attention_rank=4, expert_rank=4, dropout=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, ids, losses = torch.optim.SGD(trained, lr=0.1), IDS.to("cuda"), []
        for _ in range(4):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        outcome[kept] = torch.stack(losses).cpu()
    torch.testing.assert_close(outcome["experts"], outcome[None], atol=GPU_TOLERANCE, rtol=GPU_TOLERANCE)


def test_a_run_in_bfloat16_learns(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {{model: {tiny_base}}}\n"
        "adapter: {attention: {rank: 4}, mlp: {rank: 4}, experts: {rank: 4}}\n"
        f"data: {{sources: [{{path: {rows_file}, format: alpaca}}], max_length: 128}}\n"
        "train: {max_steps: 12, learning_rate: 0.01}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    main_ok(["train", str(recipe)])
    main_ok(["merge", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss": ' in line]
    assert losses[-1] < 0.8 * losses[0]


def main_ok(arguments: list[str]) -> None:
    """Run a verb; it must end with code 0."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
