"""The benchmarks run and print what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = "--layers 2 --hidden 64 --heads 4 --inner 128 --experts 4 --vocab 512 --seq 64 --batch 2 --rank 4 --steps 2"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_train_step_prints_one_json_line_last(quantization: str) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "train_step.py"
    command = [sys.executable, str(script), *SMALL.split(), "--quantization", quantization, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"tokens_per_s", "step_s", "peak_rss_mb", "peak_gpu_mb", "trainable", "loss"} <= set(result)
    linear = 2 * 4 * (64 + 192 + 64 + 64) + 4 * (64 + 128 + 128 + 64)
    assert result["trainable"] == linear + 4 * 4 * (64 + 128 + 128 + 64)
    assert result["tokens_per_s"] > 0
    assert 5.5 < result["loss"] < 7.5  # ln(512) = 6.2


@pytest.mark.slow
def test_the_gpus_benchmark_runs_on_a_cpu_when_small() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    small = "--layers 2 --hidden 64 --heads 4 --inner 128 --vocab 512 --seq 32 --steps 2 --decode 4 --ceiling 256"
    command = [sys.executable, str(script), *small.split(), "--tokens", "64", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["moe_layer_64"]) == {"loop", "grouped"}
    assert all(isinstance(value, float) for value in result["moe_layer_64"].values())
    for part in ("train_1_kept", "train_1_recomputed", "train_8_recomputed"):
        assert 5.5 < result[part]["loss"] < 7.5  # ln(512) = 6.2
        assert 0 < result[part]["share_of_matmul_rate"] < 1


@pytest.mark.slow
def test_merge_prints_one_json_line_last(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "merge.py"
    small = ["--layers", "2", "--hidden", "64", "--inner", "128", "--experts", "4", "--vocab", "512", "--rank", "4"]
    command = [sys.executable, str(script), *small, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    # Attention of two layers, one dense MLP, four experts; two projections each, A and B.
    assert result["adapter_tensors"] == result["proof"]["applied_once"] == 2 * (4 + 2 + 8)
    assert result["ratio"] == pytest.approx(result["merge_s"] / (sum(result["copy_s"]) / 2), rel=0.5)
    assert result["memory_mb"]["merge"]["peak"]["anonymous"] < 300
    assert list(tmp_path.iterdir()) == []
