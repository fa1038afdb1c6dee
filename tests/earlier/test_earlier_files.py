"""Adapters, caches, runs, checkpoints and merges of an earlier version are read, and give the same numbers as then."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lola_ft
from tests.conftest import Outcome

FILES = Path(__file__).parent / "files"
ADAPTERS = sorted(folder.name for folder in (FILES / "adapters").iterdir())
LAYOUTS = ("peft", "per_expert")
FAMILIES = ("lola", "gpt2", "bloom")
STOPPED = sorted(folder.name for folder in (FILES / "stopped").iterdir())

# For logits of up to 10. Another processor or kernel sums float32 products in another order.
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
# For single weights after a merge or a rounding: the order of one product's sum.
WEIGHTS = {"atol": 1e-6, "rtol": 1e-5}

Verb = Callable[..., Outcome]
Logits = Callable[[str], Tensor]
Compute = Callable[[Any], Tensor]


def test_every_stored_file_exists() -> None:
    assert len(ADAPTERS) == 9
    assert STOPPED == ["gpt2", "lola"]
    assert sorted(folder.name for folder in (FILES / "finished").iterdir()) == sorted(FAMILIES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_stored_logits(
    name: str, layout: str, earlier: Path, earlier_logits: Logits, logits_of: Compute
) -> None:
    quantization = "nf4" if name == "loftq" else None
    base = lola_ft.load_base(earlier / "bases" / "lola", quantization, "float32", "cpu", quiet=True)
    model = lola_ft.load_adapter(base, earlier / "adapters" / name / layout)
    assert_close(logits_of(model), earlier_logits(f"adapters/{name}"), **LOGITS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_conversion_writes_the_stored_files(name: str, layout: str, earlier: Path, verb: Verb) -> None:
    """Converted from the other layout, the files have the stored tensors, number by number, and the same metadata."""
    other = {"peft": "per_expert", "per_expert": "peft"}[layout]
    source, out = f"adapters/{name}/{other}", earlier / "converted"
    outcome = verb("convert", source, "--base", "./bases/lola", "--layout", layout, "--out", str(out))
    assert outcome.code == 0, outcome.err
    stored = earlier / "adapters" / name / layout
    assert_same_tensors(out / "adapter_model.safetensors", stored / "adapter_model.safetensors")
    assert adapter_settings(out) == adapter_settings(stored)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the keys of `adapter_config.json` that affect the numbers. Others differ between versions of PEFT."""
    config = json.loads((folder / "adapter_config.json").read_text())
    keys = ("peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")
    lists = ("target_modules", "target_parameters", "modules_to_save")
    found = {key: config.get(key) for key in (*keys, "use_dora", "use_rslora", "init_lora_weights")}
    return found | {key: sorted(config.get(key) or []) for key in lists}


def assert_same_tensors(file: Path, expected: Path) -> None:
    """Assert the same names, dtypes, numbers (bit for bit) and metadata."""
    ours, theirs = load_file(file), load_file(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    with safe_open(file, "pt") as one, safe_open(expected, "pt") as other:
        assert one.metadata() == other.metadata()


# The quantised base.


def cache_of(folder: Path) -> Path:
    """The folder of LOLA's quantised base."""
    return next((folder / "cache" / "nf4").iterdir())


def test_quantising_gives_the_stored_bits(earlier: Path, verb: Verb, tmp_path: Path) -> None:
    outcome = verb("quantize", "./bases/lola", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    stored, anew = cache_of(earlier), tmp_path / "own-cache" / "nf4" / cache_of(earlier).name
    assert json.loads((anew / "source.json").read_text()) == json.loads((stored / "source.json").read_text())
    assert sorted(file.name for file in anew.iterdir()) == sorted(file.name for file in stored.iterdir())
    ours, theirs = load_file(anew / "nf4.safetensors"), load_file(stored / "nf4.safetensors")
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(ours[name], tensor), name
        else:
            assert_close(ours[name], tensor, **WEIGHTS)


def test_the_cache_is_loaded_without_quantising(
    earlier: Path, logits_of: Compute, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache's bits are those of quantising again. A change only in the cache shows when loading."""

    def load() -> Tensor:
        return logits_of(lola_ft.load_base("./bases/lola", "nf4", "float32", "cpu", quiet=True))

    quantised = load()
    assert not (tmp_path / "own-cache" / "nf4").exists(), "loading stores nothing by itself"
    monkeypatch.setenv("LOLA_FT_CACHE", str(earlier / "cache"))
    assert_close(load(), quantised, **LOGITS)
    file = cache_of(earlier) / "nf4.safetensors"
    tensors = load_file(file)
    tensors["transformer.ln_f.weight"] *= 2
    save_file(tensors, file)
    assert (load() - quantised).abs().max() > 0.1


def test_the_cache_replaces_a_missing_base(
    earlier: Path, earlier_logits: Logits, logits_of: Compute, verb: Verb
) -> None:
    """The original weights are gone, so a run's adapter is loaded onto the 4-bit form, and merged into it."""
    cache = cache_of(earlier)
    shutil.rmtree("bases")
    expected = earlier_logits("finished/lola/nf4")
    base = lola_ft.load_base(cache, "nf4", "float32", "cpu", quiet=True)
    assert_close(logits_of(lola_ft.load_adapter(base, "finished/lola/adapter")), expected, **LOGITS)
    outcome = verb("merge", "finished/lola", "--base", str(cache), "--out", "merged/anew")
    assert outcome.code == 0, outcome.err
    merged = lola_ft.load_base("merged/anew", None, "float32", "cpu", quiet=True)
    assert_close(logits_of(merged), expected, **LOGITS)


# Runs.


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_resumes_to_the_stored_end(name: str, earlier: Path, verb: Verb) -> None:
    """Resume from the checkpoint of step 4, and end with the results of the version that wrote it.

    On the machine that the files come from, the adapter is bit-equal. On others, sums differ in the last digit, Adam
    divides a small gradient by its own size, and a moment stored in 8 bits may have the neighbouring code.
    """
    expected = Path("finished", name).rename(earlier / "expected")
    Path("stopped", name).rename(earlier / "finished" / name)
    outcome = verb("train", f"recipes/{name}.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert "from step 4" in outcome.out
    run = earlier / "finished" / name
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, expected))
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert_close(ours[key], tensor, atol=1e-4, rtol=1e-4)
    assert adapter_settings(run / "adapter") == adapter_settings(expected / "adapter")
    assert_same_metrics(run, expected)
    names = {path.name for path in expected.iterdir()} | {"checkpoints"}
    assert names <= {path.name for path in run.iterdir()}
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-4", "step-7"]


def assert_same_metrics(run: Path, expected: Path) -> None:
    """Assert the same lines, keys and numbers, except speed, and the same results in the manifest."""
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (run, expected))
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert line == approximately(other), f"step {other['step']}"
    results = [json.loads((folder / "manifest.json").read_text())["results"] for folder in (run, expected)]
    assert results[0] == approximately(results[1])


def read_lines(file: Path) -> list[dict[str, Any]]:
    speed = ("tokens_per_s", "_runtime", "_per_second", "total_flos")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(speed)} for line in lines]


def approximately(value: Any) -> Any:
    """Return numbers to compare to four digits; see `test_a_stopped_run_resumes_to_the_stored_end`."""
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    return pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_finished_run_gives_the_stored_logits(
    name: str,
    quantization: str,
    earlier_logits: Logits,
    logits_of: Compute,
    open_run: Callable[[str, str], Any],
) -> None:
    model = open_run(f"finished/{name}", quantization)
    assert_close(logits_of(model), earlier_logits(f"finished/{name}/{quantization}"), **LOGITS)


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_a_finished_run_changes_nothing(name: str, verb: Verb) -> None:
    before = {path: path.read_bytes() for path in Path("finished", name).rglob("*") if path.is_file()}
    outcome = verb("train", f"recipes/{name}.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert "is finished" in outcome.out
    assert before == {path: path.read_bytes() for path in Path("finished", name).rglob("*") if path.is_file()}


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("name", FAMILIES)
def test_an_evaluation_gives_the_stored_results(name: str, verb: Verb) -> None:
    """Results of base and run by language, including intervals, because the bootstrap has a seed."""
    rows = ("--data", "rows.jsonl", "--format", "alpaca", "--language-column", "language")
    outcome = verb("evaluate", f"./bases/{name}", f"finished/{name}", *rows, "--out", "evaluated")
    assert outcome.code == 0, outcome.err
    ours, theirs = (
        json.loads((Path(folder) / "loss.json").read_text()) for folder in ("evaluated", f"evaluations/{name}")
    )
    assert ours["models"] == theirs["models"]
    assert ours["results"] == approximately(theirs["results"])


# Merged models.


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_run_gives_the_stored_logits(
    name: str, earlier_logits: Logits, logits_of: Compute, verb: Verb
) -> None:
    outcome = verb("merge", f"finished/{name}", "--out", "merged/anew")
    assert outcome.code == 0, outcome.err
    merged = AutoModelForCausalLM.from_pretrained("merged/anew", dtype=torch.float32)
    assert_close(logits_of(merged), earlier_logits(f"finished/{name}/none"), **LOGITS)


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merge_writes_the_stored_files(layout: str, verb: Verb) -> None:
    """The weights, the other files, and the counts in the report."""
    outcome = verb("merge", f"adapters/lora/{layout}", "--base", "./bases/lola", "--out", "merged/anew")
    assert outcome.code == 0, outcome.err
    ours, theirs = Path("merged", "anew"), Path("merged", "lola")
    added = {"configuration_lola.py", "modeling_lola.py"}  # lola_ft's code, which earlier merges lack
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()} | added
    state, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert_close(state[name], tensor, **WEIGHTS)
    assert counted(ours) == counted(theirs) | {"adapter_layout": layout, "stages": [], "other_code": []}


def counted(merged: Path) -> dict[str, Any]:
    """Return the parts of `merge_report.json` that are no measurements."""
    report = json.loads((merged / "merge_report.json").read_text())
    proof = report["weights"]
    return {key: value for key, value in report.items() if not isinstance(value, dict | float)} | {
        f"weights.{key}": proof[key]
        for key in ("tensors", "untouched", "touched", "rows", "applied_once", "without_update", "sample", "values")
    }


@pytest.mark.usefixtures("earlier")
def test_a_stored_merge_gives_its_adapters_logits(earlier_logits: Logits, logits_of: Compute) -> None:
    merged = lola_ft.load_base("merged/lola", None, "float32", "cpu", quiet=True)
    assert_close(logits_of(merged), earlier_logits("adapters/lora"), **LOGITS)
