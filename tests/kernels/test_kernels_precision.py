"""The dtype in which two models are compared."""

import pytest
import torch

from lola_ft.kernels.precision import comparison_dtype, has_bfloat16, is_small

CPU = torch.device("cpu")
LARGEST_SMALL = 1_000_000_000  # parameters: 4 GB in float32


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_small_models_are_compared_in_float32(wanted: torch.dtype) -> None:
    assert is_small(LARGEST_SMALL)
    assert comparison_dtype(LARGEST_SMALL, wanted, CPU) == torch.float32


def test_large_models_are_compared_in_a_dtype_that_the_machine_has() -> None:
    assert not is_small(LARGEST_SMALL + 1)
    assert comparison_dtype(LARGEST_SMALL + 1, torch.float16, CPU) == torch.float16
    bfloat16 = comparison_dtype(LARGEST_SMALL + 1, torch.bfloat16, CPU)
    assert bfloat16 == (torch.bfloat16 if has_bfloat16(CPU) else torch.float32)
