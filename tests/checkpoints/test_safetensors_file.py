"""Reading tensors ahead of the one that is worked on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lola_ft.checkpoints.safetensors_file import Wanted, read_ahead, read_header


@pytest.mark.parametrize("ahead", [1, 2])
def test_every_tensor_is_read_in_order_whether_its_memory_is_borrowed_or_its_own(tmp_path: Path, ahead: int) -> None:
    torch.manual_seed(0)
    tensors = {f"t{n}": torch.randn(3 + 5 * (n % 3), 7).to(torch.bfloat16) for n in range(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    borrowed = {entry.name for entry in entries[::2]}
    wanted = [Wanted(e, None if e.name in borrowed else torch.float32, e.name in borrowed) for e in entries]
    kept, places, names = {}, set(), []
    for entry, tensor in read_ahead(wanted, ahead):
        names.append(entry.name)
        assert torch.equal(tensor.to(torch.bfloat16), tensors[entry.name])
        if entry.name in borrowed:
            places.add(tensor.data_ptr())
        else:
            kept[entry.name] = tensor
    assert names == [entry.name for entry in entries]
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in kept.items())
    # Three sizes: a place grows at most twice.
    assert len(places) <= 3 * (ahead + 1)


def test_borrowed_memory_is_not_taken_while_its_tensor_is_worked_on(tmp_path: Path) -> None:
    save_file({f"t{n}": torch.full((1000,), float(n)) for n in range(6)}, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    places = []
    for entry, tensor in read_ahead([Wanted(entry, borrowed=True) for entry in entries]):
        places.append(tensor.data_ptr())
        assert (tensor == float(entry.name[1:])).all()
    assert len(set(places)) == 2  # the one worked on, and the one read ahead
