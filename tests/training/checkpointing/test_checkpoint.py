"""Checkpoints on disk: exact, whole or passed over, and never a pickle that is run."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from lola_ft.errors import UserError
from lola_ft.training.checkpointing.checkpoint import checkpoints, newest_whole, remove_leftovers, write_checkpoint
from lola_ft.training.checkpointing.rng import rng_state, set_rng_state, untouched_rng
from lola_ft.training.checkpointing.state_file import read_state, write_state


def same(one: Any, other: Any) -> bool:
    """Equal in kind and value, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    shared = torch.arange(256, dtype=torch.uint8)
    state = {
        "numbers": (1, 0.1, 1 / 3, 2**70, True, None, "text", float("inf")),
        3: [{"qmap1": shared, "qmap2": shared[:128]}, torch.tensor(7.5), ()],
        "transposed": torch.randn(3, 4, dtype=torch.bfloat16).T,
        "empty": {},
    }
    write_state(tmp_path, state)
    assert same(read_state(tmp_path), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
        lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=0.01),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    ],
    ids=["adamw", "fused", "8bit", "sgd"],
)
def test_an_optimizer_goes_on_exactly(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    """8-bit states are kept of tensors with 4096 numbers and more."""
    torch.manual_seed(0)
    one = [nn.Parameter(torch.randn(80, 64)), nn.Parameter(torch.randn(5))]
    gradients = [[torch.randn_like(parameter) for parameter in one] for _ in range(6)]
    optimizer = make(one)
    take_steps(optimizer, one, gradients[:3])
    if isinstance(optimizer, bitsandbytes.optim.AdamW8bit):
        assert optimizer.state[one[0]]["state1"].dtype == torch.uint8
    write_state(tmp_path, {"optimizer": optimizer.state_dict()})
    other = [nn.Parameter(parameter.detach().clone()) for parameter in one]
    resumed = make(other)
    resumed.load_state_dict(read_state(tmp_path)["optimizer"])
    take_steps(optimizer, one, gradients[3:])
    take_steps(resumed, other, gradients[3:])
    assert all(map(torch.equal, one, other))


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def draw() -> list[Any]:
    import random

    import numpy as np

    return [random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()]


def test_random_numbers_go_on(tmp_path: Path) -> None:
    draw()
    write_state(tmp_path, rng_state())
    expected = draw(), draw()
    with untouched_rng():
        draw()
    set_rng_state(read_state(tmp_path))
    assert (draw(), draw()) == expected
    set_rng_state(read_state(tmp_path))
    with untouched_rng():
        draw()
    assert (draw(), draw()) == expected


def fill(step: int) -> Callable[[Path], None]:
    return lambda folder: write_state(folder, {"step": step, "tensor": torch.full((4,), step)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 10."""
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step, fill(step), keep=3)
    return tmp_path


def test_the_newest_are_kept(folder: Path) -> None:
    assert [path.name for path in checkpoints(folder)] == ["step-2", "step-4", "step-10"]
    write_checkpoint(folder, 11, fill(11), keep=2)
    assert [path.name for path in checkpoints(folder)] == ["step-10", "step-11"]
    write_checkpoint(folder, 10, fill(10), keep=1)  # gone on from before 11, which is left behind
    assert [path.name for path in checkpoints(folder)] == ["step-10"]


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def replace_by_pickle(checkpoint: Path, name: str) -> None:
    """As an attacker would: the checksum fits."""
    data = pickle.dumps(Evil(checkpoint.parent / "ran"))
    old = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / name).write_bytes(data)
    sums = checkpoint / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(data).hexdigest()))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "state.json has changed": lambda path: (path / "state.json").write_text("{}"),
    "state.safetensors is missing": lambda path: (path / "state.safetensors").unlink(),
    "optimizer.pt is not one of its files": lambda path: (path / "optimizer.pt").write_bytes(b"\x80\x02"),
    "SHA256SUMS is empty": lambda path: (path / "SHA256SUMS").write_text(""),
    "No such file": lambda path: (path / "SHA256SUMS").unlink(),
    "state.safetensors": lambda path: replace_by_pickle(path, "state.safetensors"),
    "state.json": lambda path: replace_by_pickle(path, "state.json"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(folder: Path, what: str) -> None:
    DAMAGES[what](folder / "step-10")
    said: list[str] = []
    found = newest_whole(folder, said.append)
    assert found is not None
    assert (found.step, found.state["step"]) == (4, 4)
    assert len(said) == 1
    assert "step-10 is damaged" in said[0]
    if " " in what:
        assert what in said[0]
    assert not (folder / "ran").exists()


def test_what_was_half_written_is_no_checkpoint(folder: Path) -> None:
    (folder / ".step-12.partial").mkdir()
    (folder / "step-x").mkdir()
    found = newest_whole(folder, pytest.fail)
    assert found is not None
    assert found.step == 10
    remove_leftovers(folder)
    assert not (folder / ".step-12.partial").exists()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_a_checkpoint_that_cannot_be_written(folder: Path, error: OSError) -> None:
    def fail(partial: Path) -> None:
        fill(12)(partial)
        raise error

    with pytest.raises(UserError, match=f"step-12: .*{error.strerror}.*the newest is step-10") as caught:
        write_checkpoint(folder, 12, fail, keep=1)
    assert "--resume" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-2", "step-4"]
    assert newest_whole(folder, pytest.fail) is not None
