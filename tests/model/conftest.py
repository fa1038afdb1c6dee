"""Models that tests only read. Fixtures that rewrite files are in the conftest one folder up."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lola_ft.model import LolaForCausalLM


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LolaForCausalLM]) -> LolaForCausalLM:
    """A random model in evaluation mode; do not change it."""
    return make_model()


@pytest.fixture(scope="session")
def golden_model(golden_base: Path) -> LolaForCausalLM:
    """The authors' checkpoint in the native model, in float32 and evaluation mode; do not change it."""
    return AutoModelForCausalLM.from_pretrained(golden_base).eval()
