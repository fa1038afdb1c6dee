"""The audit's numbers, compared with a count by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from lola_ft import load_base
from lola_ft.quantization import audit

# The base of conftest: D hidden, F inner, V vocabulary, P positions; 4 layers of which 2 hold E experts.
D, F, V, P, E = 64, 128, 320, 64, 4
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def nf4_bytes(numel: int) -> int:
    """Return the bytes of codes, one byte per block of 64, one float32 per 256 blocks, and the mean."""
    blocks = -(-numel // 64)
    return numel // 2 + blocks + 4 * -(-blocks // 256) + 4


def linear_bytes(numel: int) -> int:
    """Return the bytes of a linear layer, with which bitsandbytes stores 16 levels and 256 of scales, in float32."""
    return nf4_bytes(numel) + 4 * 16 + 4 * 256


@pytest.mark.parametrize("dtype", list(WIDTH))
def test_the_audit_of_a_4_bit_model_equals_a_count_by_hand(dtype: str, base: Path) -> None:
    counts = audit(load_base(base, dtype=dtype, quiet=True)).as_dict()
    width = WIDTH[dtype]

    def dense(parameters: int) -> dict[str, int]:
        return {"parameters": parameters, "bytes": width * parameters}

    assert counts == {
        f"embeddings {dtype}": dense((V + P) * D),
        f"attention {dtype}": dense(4 * (3 * D + D)),
        "attention nf4": {
            "parameters": 4 * 4 * D * D,
            "bytes": 4 * (linear_bytes(3 * D * D) + linear_bytes(D * D)),
        },
        f"dense mlp {dtype}": dense(2 * (F + D)),
        "dense mlp nf4": {"parameters": 2 * 2 * D * F, "bytes": 2 * 2 * linear_bytes(D * F)},
        f"experts {dtype}": dense(2 * E * (F + D)),
        "experts nf4": {
            "parameters": 2 * E * 2 * D * F,
            "bytes": 2 * (E * 2 * nf4_bytes(D * F) + 4 * 256),  # the 256 levels of the scales, once per layer
        },
        f"router {dtype}": dense(2 * E * D),
        f"norms {dtype}": dense(4 * 2 * 2 * D + 2 * D),
    }


def test_the_audit_of_a_dense_model_equals_a_count_by_hand(base: Path) -> None:
    result = audit(load_base(base, quantization=None, dtype="bfloat16", quiet=True))
    parts = {key: count["parameters"] for key, count in result.as_dict().items()}
    assert parts == {
        "embeddings bfloat16": (V + P) * D,
        "attention bfloat16": 4 * (4 * D * D + 4 * D),
        "dense mlp bfloat16": 2 * (2 * D * F + F + D),
        "experts bfloat16": 2 * E * (2 * D * F + F + D),
        "router bfloat16": 2 * E * D,
        "norms bfloat16": 4 * 2 * 2 * D + 2 * D,
    }
    assert result.total_bytes == 2 * result.total_parameters


def test_four_bit_stands_for_as_many_parameters_as_dense(base: Path) -> None:
    four_bit, dense = (audit(load_base(base, quantization=q, quiet=True)) for q in ("nf4", None))
    assert four_bit.total_parameters == dense.total_parameters
    assert dense.total_parameters == load_base(base, quantization=None, quiet=True).num_parameters()
    assert four_bit.total_bytes < dense.total_bytes / 2


def test_bytes_are_those_of_the_memory(base: Path) -> None:
    """The bytes are those of every storage of a 4-bit model, each counted once."""
    model = load_base(base, quiet=True)
    storages: dict[int, int] = {}
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    for tensor in tensors:
        storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    assert audit(model).total_bytes == sum(storages.values())


def test_tied_weights_count_once() -> None:
    module = nn.ModuleDict({"wte": nn.Embedding(5, 3), "lm_head": nn.Linear(3, 5, bias=False)})
    module["lm_head"].weight = module["wte"].weight
    assert audit(module).total_parameters == 15


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_loading_prints_the_table(quantization: str | None, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_base(base, quantization=quantization)
    printed = " ".join(capsys.readouterr().out.split())
    result = audit(model)
    for word in ("embeddings", "attention", "dense mlp", "experts", "router", "norms", "all"):
        assert word in printed
    assert f"{result.total_parameters:,}" in printed
    assert f"{result.total_bytes:,}" in printed
    assert ("NF4 with double quantisation" in printed) == (quantization == "nf4")
    load_base(base, quantization=quantization, quiet=True)
    assert "embeddings" not in capsys.readouterr().out


def test_a_large_model_takes_4_13_bits_per_weight(write_base: Callable[..., Path]) -> None:
    """At sizes where the fixed 1 kB per layer does not matter, a 4-bit weight takes 4.13 bits."""
    counts = audit(load_base(write_base(n_embd=512, n_inner=2048, num_experts=2, n_layer=2), quiet=True)).counts
    for part in ("experts", "attention", "dense mlp"):
        count = counts[part, "nf4"]
        assert 8 * count.num_bytes / count.parameters == pytest.approx(4.13, abs=0.03)
    assert counts["experts", "nf4"].parameters == 2 * 2 * 512 * 2048
    assert counts["router", "bfloat16"].num_bytes == 2 * 2 * 512
