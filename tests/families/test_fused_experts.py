"""A family whose files hold all experts of a layer in one tensor: processed expert by expert, written in its layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import CheckpointError
from lola_ft.evaluation.scoring import score
from lola_ft.planning.merged_sizes import merged_files
from lola_ft.quantization import load_base, quantize_base
from tests.families.conftest import random_adapter

KIND = "granitemoe"
FILE = "model.safetensors"
FUSED = "model.layers.1.block_sparse_moe.input_linear.weight"


def test_a_merge_writes_the_tensors_of_the_file(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    """Names, shapes, order and size are the base's, also if only the 4-bit form exists."""
    base = moe_bases[KIND]
    adapter = random_adapter(base, KIND, tmp_path / "adapter")
    lola_ft.merge(base, adapter, tmp_path / "merged", check="weights")
    lola_ft.merge(quantize_base(base, "float32", quiet=True), adapter, tmp_path / "again", check="weights")
    shapes = {name: tensor.shape for name, tensor in load_file(base / FILE).items()}
    assert shapes[FUSED] == (8, 64, 64)
    for folder in ("merged", "again"):
        assert {name: t.shape for name, t in load_file(tmp_path / folder / FILE).items()} == shapes
    architecture = BaseCheckpoint.open(base).architecture
    size = (tmp_path / "merged" / FILE).stat().st_size
    assert merged_files(base, architecture) == {FILE: size}
    config_alone = Path(shutil.copytree(base, tmp_path / "config", ignore=lambda *_: [FILE]))
    assert merged_files(config_alone, architecture) == {FILE: size}


@pytest.mark.slow
def test_a_base_in_several_files_is_merged_file_by_file(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(moe_bases[KIND], dtype=torch.float32)
    stock.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    adapter = random_adapter(tmp_path / "sharded", KIND, tmp_path / "adapter")
    lola_ft.merge(tmp_path / "sharded", adapter, tmp_path / "merged")
    index = "model.safetensors.index.json"
    found, expected = (
        json.loads((folder / index).read_text()) for folder in (tmp_path / "merged", tmp_path / "sharded")
    )
    assert found["weight_map"] == expected["weight_map"]


def test_a_stack_of_another_number_of_experts_is_refused(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(moe_bases[KIND], tmp_path / "base"))
    state = load_file(base / FILE)
    state[FUSED] = state[FUSED][:7].contiguous()
    save_file(state, base / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 weights that config.json calls for are missing: .*experts\.7\.gate"):
        load_base(base, quiet=True)


def test_evaluation_divides_the_logits_too(moe_bases: dict[str, Path]) -> None:
    ids = list(range(20, 40))
    model = load_base(moe_bases[KIND], None, "float32", "cpu", quiet=True)
    stock = AutoModelForCausalLM.from_pretrained(moe_bases[KIND], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    (nats,) = score(model, [(ids, [-100, *ids[1:]])])
    torch.testing.assert_close(torch.tensor(nats.mean()).float(), expected)
