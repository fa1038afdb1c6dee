"""Every variant of the Triton kernels gives the plain products (interpreted on a CPU), and fits its chip (compiled)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.kernel_variants import Variant, all_variants, variants
from lola_ft.kernels.grouping import Grouping, group_on_device
from lola_ft.kernels.launch_settings import SHARED_BYTES, Launch, launches_of, rank_block
from lola_ft.kernels.products import Side
from lola_ft.kernels.triton_products import TritonProducts
from lola_ft.quantization import NF4Experts
from tests.grids import slow_but

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
_EXPERTS, _HIDDEN, _INNER = 3, 128, 64


def test_each_two_settings_meet() -> None:
    chosen, every = variants(), all_variants()
    assert len(chosen) < len(every) / 10
    for first in ("tile", "gated", "in_by_out", "forward", "extra", "rank"):
        for second in ("tile", "gated", "in_by_out", "forward", "extra", "rank"):
            pairs = [{(getattr(v, first), getattr(v, second)) for v in some} for some in (chosen, every)]
            assert pairs[0] == pairs[1], f"{first} and {second}"


@pytest.mark.parametrize("variant", slow_but(variants()[:2], variants()), ids=str)
def test_interpreted_it_gives_the_plain_products(variant: Variant) -> None:
    experts, generator = make_experts(variant), torch.Generator().manual_seed(0)
    weight = experts.weights("gate_up_proj" if variant.gated else "up_proj")
    groups = group_on_device(torch.tensor([0] * (variant.tile + 3) + [2] * 5), _EXPERTS, variant.tile)
    dense = weight.dense(torch.float32)
    if variant.in_by_out != variant.forward:
        dense = dense.transpose(1, 2)
    size_in, size_out = dense.shape[1:]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    x, side = random(groups.num_rows, size_in), None
    expected = torch.stack([x[row] @ dense[e] for row, e in enumerate(groups.expert_of_row().tolist())])
    if weight.bias is not None and variant.forward:
        expected += weight.bias[groups.expert_of_row()]
    if variant.rank:
        keep = random(groups.num_rows, size_out) > 0 if variant.extra and not variant.forward else None
        side = Side(random(groups.num_rows, variant.rank), random(_EXPERTS, size_out, variant.rank), keep, 1.5)
        added = torch.einsum("nr,nor->no", side.hidden_NR, side.factor_EOR[groups.expert_of_row()])
        expected += added if keep is None else added * keep * 1.5
    products = TritonProducts(Launch(64, 64, 4, 1))
    got = (products.times if variant.forward else products.times_transposed)(x, weight, groups, side)
    used = groups.row_of_choice_C
    torch.testing.assert_close(got[used], expected[used], rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("rank", slow_but([72], [8, 64, 72, 130]))
def test_factors_of_every_rank(rank: int) -> None:
    """Ranks of more than one block are computed by several programs."""
    generator = torch.Generator().manual_seed(0)
    groups = group_on_device(torch.tensor([0] * 19 + [2] * 5), _EXPERTS, 16)
    x, left = torch.randn(groups.num_rows, 96, generator=generator), torch.randn(groups.num_rows, rank)
    factor, products = torch.randn(_EXPERTS, rank, 96, generator=generator), TritonProducts(Launch(64, 64, 4, 1))
    x, left = x * used_rows(groups), left * used_rows(groups)
    expected = torch.einsum("ni,nri->nr", x, factor[groups.expert_of_row()])
    used = groups.row_of_choice_C
    torch.testing.assert_close(products.to_rank(x, factor, groups)[used], expected[used], rtol=1e-4, atol=1e-4)
    of_row = torch.nn.functional.one_hot(groups.expert_of_row(), _EXPERTS).float()
    outer = torch.einsum("ne,nr,ni->eri", of_row, left, x)
    torch.testing.assert_close(products.outer(left, x, groups), outer, rtol=1e-4, atol=1e-4)


def used_rows(groups: Grouping) -> torch.Tensor:
    """Return (N, 1): 1 for rows of a choice, 0 for unused rows between groups."""
    return torch.zeros(groups.num_rows, 1).index_fill_(0, groups.row_of_choice_C, 1)


def make_experts(variant: Variant) -> NF4Experts:
    settings = {"has_gate": variant.gated, "is_transposed": variant.in_by_out, "has_bias": variant.extra}
    experts = NF4Experts(_HIDDEN, _INNER, _EXPERTS, activation="silu", **settings)
    experts.allocate(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for part in experts.parts:
        for e in range(_EXPERTS):
            experts.load_expert(part, e, torch.randn(experts.part_shape(part), generator=generator) * 0.3)
    for name, parameter in experts.named_parameters():
        if name.endswith("_bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return experts


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED_BYTES, ids=lambda chip: ".".join(map(str, chip)))
def test_compiled_it_fits_its_chip(chip: tuple[int, int], tmp_path: Path) -> None:
    """No variant that is used spills registers, or needs more than the chip has. This needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, SCRIPT, "--chips", ".".join(map(str, chip))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    half = "float16" if chip < (8, 0) else "bfloat16"
    kernels = {(row["dtype"], row["kernel"]): row for row in found["kernels"]}
    assert set(kernels) == {(dtype, name) for dtype in (half, "float32") for name in ("product", "to_rank", "outer")}
    assert all(row["variants"] > 0 and 0 < row["registers"] <= 255 for row in kernels.values())
    assert (kernels[half, "product"]["variants"] == len(variants())) is (chip >= (8, 0))


def test_a_chip_without_matrix_instructions_only_decodes_with_the_kernels() -> None:
    for chip, dtype in (((7, 5), torch.float16), ((9, 0), torch.float32)):
        assert [tile for tile in (16, 32, 64, 128) if launches_of(chip, dtype, tile)] == [16]
    assert all(launches_of(chip, torch.bfloat16, 128) for chip in SHARED_BYTES if chip >= (8, 0))


def test_ranks_are_taken_in_blocks() -> None:
    assert [rank_block(rank) for rank in (1, 16, 17, 40, 64, 65, 1024)] == [16, 16, 32, 64, 64, 64, 64]
