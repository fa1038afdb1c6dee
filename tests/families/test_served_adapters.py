"""The names in an adapter's file are those that vLLM and SGLang read for mixtures of experts.

Neither of them is needed here. The names that they read are written as patterns: for vLLM one pair of matrices per
expert, or PEFT's two stacks per layer; for SGLang one pair per expert.
"""

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from lola_ft.adapters.convert import convert_adapter
from tests.grids import slow_but

LAYER = r"base_model\.model\.model\.layers\.\d+"
# vLLM maps both sets of names to its own w1, w2 and w3; SGLang reads the first.
PER_EXPERT = {
    "olmoe": rf"{LAYER}\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.lora_[AB]\.weight",
    "qwen3_moe": rf"{LAYER}\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.lora_[AB]\.weight",
    "mixtral": rf"{LAYER}\.block_sparse_moe\.experts\.\d+\.(w1|w2|w3)\.lora_[AB]\.weight",
}
STACKED = rf"{LAYER}\.mlp\.experts\.(base_layer\.)?lora_[AB]\.weight"


def names(adapter: Path) -> list[str]:
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return [name for name in file.keys() if ".experts." in name]  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("kind", slow_but(["olmoe"], PER_EXPERT))
def test_expert_tensors_have_the_names_that_serving_engines_read(
    kind: str, moe_bases: dict[str, Path], moe_adapters: dict[str, Path], tmp_path: Path
) -> None:
    stacked = names(moe_adapters[kind])
    assert stacked
    assert [name for name in stacked if not re.fullmatch(STACKED, name)] == []
    convert_adapter(moe_adapters[kind], moe_bases[kind], "per_expert", tmp_path / "per_expert")
    by_expert = names(tmp_path / "per_expert")
    assert by_expert
    assert [name for name in by_expert if not re.fullmatch(PER_EXPERT[kind], name)] == []
