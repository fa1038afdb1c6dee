"""The order of the copies of layers whose store is in host memory."""

import random

import pytest
import torch

from lola_ft.quantization.layer_copies import LayerCopies
from tests.simulated_device import SimulatedTransfers


def make(layers: int) -> tuple[LayerCopies, SimulatedTransfers]:
    """Return copies of layers whose stores are eight bytes, all of them the layer's number."""
    transfers = SimulatedTransfers()
    copies = LayerCopies(transfers)
    for layer in range(layers):
        copies.add(8)[1].fill_(layer)
    return copies, transfers


def use(copies: LayerCopies, transfers: SimulatedTransfers, layer: int) -> None:
    """Compute with a layer, whose buffer must then have its store."""
    with copies.use(layer):
        assert transfers.buffers[layer % 2].eq(layer).all()


def test_two_buffers_are_all_that_the_device_has() -> None:
    assert [len(make(layers)[1].buffers) for layers in (1, 2, 3, 7)] == [1, 2, 2, 2]


def test_a_training_step_copies_all_but_two_layers_forward_and_again_backward() -> None:
    copies, transfers = make(5)
    for step in range(3):
        for layer in range(5):
            use(copies, transfers, layer)
        assert transfers.copied() == ([0, 1, 2, 3, 4] if step == 0 else [2, 3, 4])
        with torch.no_grad():  # as backward is
            for layer in reversed(range(5)):
                use(copies, transfers, layer)
        assert transfers.copied() == [2, 1, 0]


def test_recomputed_layers_are_copied_as_often() -> None:
    """A layer that is computed again is used twice before the next one."""
    copies, transfers = make(5)
    for _ in range(2):
        for layer in range(5):
            use(copies, transfers, layer)
        transfers.copied()
        for layer in reversed(range(5)):
            use(copies, transfers, layer)
            with torch.no_grad():
                use(copies, transfers, layer)
        assert transfers.copied() == [2, 1, 0]


@pytest.mark.parametrize(
    ("layers", "passes"),
    [(4, [[0, 1, 2, 3, 0], [1, 2, 3, 0], [1, 2, 3, 0]]), (5, [[0, 1, 2, 3, 4]] * 3)],  # five: both ends share a buffer
)
@torch.no_grad()
def test_without_gradients_the_first_layer_follows_the_last(layers: int, passes: list[list[int]]) -> None:
    copies, transfers = make(layers)
    for expected in passes:
        for layer in range(layers):
            use(copies, transfers, layer)
        assert transfers.copied() == expected


def test_the_next_layer_comes_while_one_computes() -> None:
    copies, transfers = make(6)
    for layer in range(6):
        use(copies, transfers, layer)
    for layer in reversed(range(6)):
        use(copies, transfers, layer)
    log = transfers.log
    for layer in (1, 2, 3, 4, 5):  # forward: the copy begins before the layer before has finished
        assert log.index(("copy", layer)) < log.index(("wait", layer - 1)) + 2
    down = log[log.index(("wait", 5)) + 2 :]
    for layer in (3, 2, 1, 0):
        done_above = next(place for place, entry in enumerate(down) if entry == ("wait", layer + 1)) + 1
        assert down.index(("copy", layer)) <= done_above
        assert down[done_above + 1] == ("mark",)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_any_order_gives_each_layer_its_own_store(layers: int) -> None:
    copies, transfers = make(layers)
    chance = random.Random(layers)
    for _ in range(300):
        with torch.set_grad_enabled(chance.random() < 0.5):
            use(copies, transfers, chance.randrange(layers))


def test_a_layer_that_fails_leaves_its_buffer() -> None:
    copies, transfers = make(3)
    with pytest.raises(RuntimeError, match="no memory"), copies.use(0):
        raise RuntimeError("no memory")
    for layer in (0, 2, 1, 0):
        use(copies, transfers, layer)
