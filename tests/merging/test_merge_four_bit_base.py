"""A merge into a base whose 4-bit form is the only one available."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter, save_adapter
from lola_ft.adapters.weights import AdapterWeights
from lola_ft.errors import CheckpointError, UserError
from lola_ft.merging import merge
from lola_ft.merging.merge_run import merge_command
from lola_ft.quantization import load_base, quantize_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(copy_base: Callable[..., Path]) -> Path:
    return copy_base("base")


@pytest.fixture
def four_bit(base: Path) -> Path:
    return quantize_base(base, "float32", quiet=True)


def test_a_merge_into_the_4_bit_base_equals_rounding_nf4(
    base: Path, four_bit: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(base, adapter, tmp_path / "rounded", rounding="nf4", check="none")
    shutil.rmtree(base)
    report = merge(four_bit, adapter, tmp_path / "merged")
    assert (report.base_kind, report.rounding) == ("nf4", "nf4")
    rounded, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "merged"))
    assert rounded.keys() == merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in rounded.items())
    assert report.weights is not None
    assert report.weights.applied_once == 58
    assert report.verification is not None
    assert report.verification.max_logit_difference < 1e-5
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert "the original weights were not used" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.slow
def test_trained_biases_are_merged_into_a_4_bit_base(biased_base: Path, tmp_path: Path) -> None:
    """Experts' biases are rows of a stack there. Rows of experts without trained biases do not change."""
    four_bit = quantize_base(biased_base, "float32", quiet=True)
    torch.manual_seed(0)
    settings = AdapterSettings(expert_rank=2, tune_biases=True, selection=((0, 2), (3,)))
    model = add_adapter(load_base(biased_base, "nf4", "float32", "cpu", quiet=True), settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "adapter", "per_expert")
    report = merge(four_bit, tmp_path / "adapter", tmp_path / "merged")
    assert (report.base_kind, report.biases, report.replaced) == ("nf4", 27, 27)
    assert report.applied == report.adapter_tensors == report.weights.applied_once == 27 + 3 * 2 * 2
    original, merged = (load_file(folder / "model.safetensors") for folder in (biased_base, tmp_path / "merged"))
    changed = {name for name in merged if name.endswith(".bias") and not torch.equal(merged[name], original[name])}
    assert len(changed) == 27
    assert {int(name.split(".")[5]) for name in changed if ".h.1.moe" in name} == {0, 2}
    again = load_base(tmp_path / "merged", None, "float32", "cpu", quiet=True)
    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


def test_adding_to_original_weights_is_refused(four_bit: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"original weights .*4-bit .*--rounding base"):
        merge(four_bit, adapter, tmp_path / "merged", rounding="base")
    assert not (tmp_path / "merged").exists()


def test_the_4_bit_base_is_found_if_the_original_is_gone(
    weights: AdapterWeights,
    store: Callable[..., Path],
    base: Path,
    four_bit: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights.base_fingerprint = json.loads((four_bit / "source.json").read_text())["fingerprint"]
    adapter = store(weights)
    shutil.rmtree(base)
    merge_command(str(adapter), str(base), str(tmp_path / "merged"), "auto", None, False, "weights")
    assert "because the original weights are not here" in " ".join(capsys.readouterr().out.split())
    weights.base_fingerprint = "feedfacefeedface"
    with pytest.raises(CheckpointError, match="no such folder"):
        merge(base, store(weights), tmp_path / "again")


def test_another_base_is_refused(
    weights: AdapterWeights, store: Callable[..., Path], four_bit: Path, tmp_path: Path
) -> None:
    weights.base_fingerprint = "feedfacefeedface"
    with pytest.raises(UserError, match="trained on base feedfacefeedface"):
        merge(four_bit, store(weights), tmp_path / "merged")


def test_an_older_cache_without_a_config_is_refused_with_the_fix(four_bit: Path, adapter: Path, tmp_path: Path) -> None:
    (four_bit / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json.*[Qq]uantise the base again"):
        merge(four_bit, adapter, tmp_path / "merged")


def test_the_4_bit_base_loads_without_its_source(base: Path, four_bit: Path, ids: torch.Tensor) -> None:
    expected = load_base(base, "nf4", "float32", quiet=True)
    shutil.rmtree(base)
    alone = lola_ft.load_base(four_bit, "nf4", "float32", quiet=True)
    assert torch.equal(alone(ids).logits, expected(ids).logits)
    assert alone.base_fingerprint == expected.base_fingerprint
    with pytest.raises(UserError, match="load it with quantization='nf4'"):
        load_base(four_bit, None, quiet=True)
