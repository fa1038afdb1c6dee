"""The benchmarks run and print what they promise."""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = "--layers 2 --hidden 64 --heads 4 --inner 128 --experts 4 --vocab 512 --seq 64 --batch 2 --rank 4 --steps 2"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_train_step_prints_one_json_line_last(quantization: str) -> None:
    script = BENCHMARKS / "train_step.py"
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
    script = BENCHMARKS / "gpu.py"
    small = "--layers 2 --hidden 64 --heads 4 --inner 128 --vocab 512 --seq 32 --steps 2 --decode 4 --ceiling 256"
    command = [sys.executable, str(script), *small.split(), "--tokens", "64", "--device", "cpu"]
    command += ["--minutes", "60"]  # each part's limit is a share of it
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    for family in ("lola", "olmoe"):
        layer, model = result[f"{family} layer, grouped"], result[f"{family} model"]
        assert layer["error_of_length_64"] < 0.03
        assert layer["ms_64"] > 0
        assert layer["plain_ms_64"] > 0
        assert abs(model["loss"]["chosen"] - model["loss"]["plain"]) < 0.01
        for part in ("train_1_kept", "train_1_recomputed", "train_8_recomputed"):
            assert 5.5 < model[part]["loss"] < 7.5  # ln(512) = 6.2
            assert 0 < model[part]["share_of_matmul_rate"] < 1
    assert sum(": yes, " in line or ": no, " in line for line in lines) == 2  # speeds; there is no GPU memory


def test_the_gpus_benchmark_goes_on_where_a_part_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def run(code: str, limit: float = 60) -> dict[str, Any]:
        return gpu.in_process([sys.executable, "-c", code], limit)

    said = "import json, os, sys, time; print(json.dumps({'ms': 3}), flush=True); "
    assert run(said) == {"ms": 3}
    assert run(said + "os.abort()") == {"ms": 3, "error": "ended with code -6"}
    assert run(said + "sys.exit('wrong numbers')") == {"ms": 3, "error": "ended with code 1: wrong numbers"}
    assert run(said + "time.sleep(60)", 2) == {"ms": 3, "error": "took longer than 2 s"}


def test_the_gpus_benchmark_leaves_out_what_failed_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda", "--families", "lola", "olmoe"])
    args, result, models = gpu.parse(), {"device": {"matmul_flops": 5.0}}, {}
    for name, arguments, _ in gpu.parts(args, result):
        if name.endswith(" model"):
            models[name] = arguments
        result[name] = {"error": "an illegal address"} if name == "olmoe layer, triton" else result.get(name, {"ms": 1})
    assert models["lola model"][-3:] == ["--rate", "5.0", "--without"]
    assert models["olmoe model"][-2:] == ["--without", "triton"]
    result["lola model"] = {"train_8_recomputed": {"share_of_matmul_rate": 0.5}, "decode_tokens_per_s": 90.0}
    assert [line.rpartition(": ")[2] for line in gpu.asked(result)] == ["yes, 0.5", "not measured", "no, 90.0"]


def test_the_gpus_benchmark_times_no_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    class Wrong(gpu.GroupedMatmuls):
        def to_rank(self, *given: Any) -> torch.Tensor:
            return super().to_rank(*given) * 1.2

    args = argparse.Namespace(family="olmoe", hidden=64, inner=64, heads=4, vocab=512)
    layer, top_k = gpu.random_layer(args, torch.device("cpu"), torch.float32)
    assert top_k == 8
    assert gpu.compare_way(layer, top_k, "grouped", 32, torch.float32)["error_of_length"] < 1e-3
    monkeypatch.setattr(gpu, "way_of", lambda _: Wrong())
    monkeypatch.setattr(gpu, "milliseconds", lambda *_: pytest.fail("wrong numbers were timed"))
    with pytest.raises(SystemExit, match="wrong numbers"):
        gpu.compare_way(layer, top_k, "grouped", 32, torch.float32)


@pytest.mark.slow
def test_merge_prints_one_json_line_last(tmp_path: Path) -> None:
    script = BENCHMARKS / "merge.py"
    small = ["--layers", "2", "--hidden", "64", "--inner", "128", "--experts", "4", "--vocab", "512", "--rank", "4"]
    command = [sys.executable, str(script), *small, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    # Attention of two layers, one dense MLP, four experts; two projections each, A and B.
    assert result["adapter_tensors"] == result["proof"]["applied_once"] == 2 * (4 + 2 + 8)
    assert result["ratio"] == pytest.approx(result["merge_s"] / (sum(result["copy_s"]) / 2), rel=0.5)
    assert result["memory_mb"]["merge"]["peak"]["anonymous"] < 300
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_a_stretch_of_the_pool_each_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without copying the pool, whose copies for each of some thousand experts took minutes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from random_checkpoint import _start

    from lola_ft.families import Place

    pool = torch.randn(1000)
    for shift, shape in ((7, (4, 5)), (990, (3, 7)), (995, (2, 4)), (123, (40, 50))):
        numel = torch.Size(shape).numel()
        expected = pool.roll(shift).repeat(-(-numel // 1000))[:numel].view(shape)
        made = _start("model.layers.0.mlp.experts.0.up_proj.weight", Place("p", shape, "experts"), pool, shift)
        assert torch.equal(made, expected)
    views = _start("w", Place("p", (4, 5), "experts"), pool, 1000 - 7)
    assert views.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()


@pytest.mark.slow
def test_ways_take_turns_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=os.pathsep)
    from turns import in_turns

    from tests.benchmark_ways import failing, sleeping

    seconds, figures = in_turns({"short": partial(sleeping, 0.01), "long": partial(sleeping, 0.05)}, 3, 1)
    assert seconds == {"short": [0.01] * 3, "long": [0.05] * 3}
    # The kernel's peak is summed over processors, and not exact to the page.
    assert all(found["whole"] > found["after_imports"] - 1 > 10 for found in figures.values())
    assert all(found["steps_anonymous"] > 10 for found in figures.values())
    with pytest.raises(SystemExit, match="failing"):  # at once: it does not wait for a process that is gone
        in_turns({"broken": failing}, 1, 0)


@pytest.mark.slow
def test_families_prints_ratios_beside_the_best_stock_way() -> None:
    small = "--layers 2 --hidden 64 --heads 4 --vocab 512 --seq 32 --batch 2 --rank 4 --steps 2 --families olmoe"
    command = [sys.executable, str(BENCHMARKS / "families.py"), *small.split(), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    found = result["olmoe"]
    stock = {name: value for name, value in found["tokens_per_s"].items() if name != "ours"}
    assert {"grouped_mm", "eager"} <= set(stock)
    assert found["best_stock_way"] == max(stock, key=stock.__getitem__)
    ratio = found["tokens_per_s"]["ours"] / stock[found["best_stock_way"]]
    assert found["times_faster"] == pytest.approx(ratio, rel=0.8)  # a median of ratios, here of two rounds
    assert set(found["left_out"]) | set(stock) == {"grouped_mm", "eager", "batched_mm"}
    shapes = result["top_k_against_top_1"]["shapes"].values()
    assert len({shape["top_k"] * shape["inner"] for shape in shapes}) == 1, "not the same active parameters"
    assert len({shape["experts"] * shape["inner"] for shape in shapes}) == 1, "not the same parameters"


@pytest.mark.slow
def test_the_routing_ablation_trains_every_kind_on_the_same_text() -> None:
    small = "--languages|de nl sw zu ru uk|--steps|2|--tuning-steps|1|--vocab|512|--hidden|16|--inner|32|--experts|4"
    script = str(BENCHMARKS / "routing_ablation.py")
    command = [sys.executable, script, *small.split("|"), "--seeds", "2", "--layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    found = result["result"]
    assert list(found) == ["learned", "by token", "by language", "dense, active", "dense, total"]
    router, expert, more_biases = 16 * 4, 2 * 16 * 32 + 32 + 16, 3 * 16
    assert found["learned"]["active"] - found["by token"]["active"] == router
    assert found["by language"]["parameters"] == found["by token"]["parameters"]
    assert found["dense, active"]["parameters"] == found["by token"]["active"]
    assert found["by token"]["parameters"] - found["by token"]["active"] == 3 * expert
    assert found["by token"]["parameters"] - found["dense, total"]["parameters"] == more_biases
    assert found["learned"]["low"]["difference"] == 0
    assert found["by token"]["low"]["half_width"] > 0
    assert len({(run["kind"], run["seed"]) for run in result["runs"]}) == 10


@pytest.mark.slow
def test_full_size_of_another_family_removes_what_it_wrote(tmp_path: Path) -> None:
    small = ["--family", "qwen3_moe", "--small", "--layers", "2", "--seq", "32", "--folder", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "full_size.py"), *small]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []
    # q, k, v, o and three projections of eight experts in each of two layers, A and B.
    assert result["adapter_tensors"] == 2 * 2 * (4 + 3 * 8)
    assert result["whole"]["layers"] == 48
    assert result["whole"]["train_step_s"] == pytest.approx(24 * result["train_step_s"], rel=0.02)
    assert 5.5 < result["loss"] < 7.5  # ln(512) = 6.2
    assert 0 < result["quantised_gb"] < result["base_gb"]


@pytest.mark.slow
def test_a_long_run_compares_rows_as_they_are_with_few_lengths() -> None:
    options = [*SMALL.split(), "--steps", "20", "--warmup", "10", "--shortest", "8", "--device", "cpu"]
    command = [sys.executable, str(BENCHMARKS / "long_run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    as_they_are, few = (result["ways"][way] for way in ("as they are", "few lengths"))
    assert as_they_are["loss"] == pytest.approx(few["loss"], rel=0.02)
    assert 0 < few["share_of_real_tokens"] < as_they_are["share_of_real_tokens"] < 1
    assert few["growth"] > 0


@pytest.mark.slow
def test_roofline_puts_a_top_8_family_beside_the_first() -> None:
    command = [sys.executable, str(BENCHMARKS / "roofline.py"), *SMALL.split(), "--beside", "olmoe", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["shares"]) == len(result["olmoe"]["shares"]) == 2
    # Eight experts per token, each of three matrices of 256 x 64 weights, against one of two of 128 x 64.
    assert result["olmoe"]["gflops"] * result["olmoe"]["step_s"] > 4 * result["gflops"] * result["step_s"]
    assert result["share_beside"] > 0


@pytest.mark.slow
def test_standalone_code_gives_the_native_logits() -> None:
    small = "--layers 2 --hidden 64 --heads 4 --experts 4 --vocab 512 --tokens 4 --rounds 1"
    command = [sys.executable, str(BENCHMARKS / "standalone.py"), *small.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    [own] = result["with_its_own_code"]
    assert own["largest_logit_difference"] < 1e-4
    assert own["tokens_per_s"].keys() == {"1", "32"}
    assert min(own["tokens_per_s"].values()) > 0
    assert set(result["bytes"]) == {"configuration_lola.py", "modeling_lola.py"}


@pytest.mark.slow
def test_the_readme_has_the_table_of_gpus_that_the_plans_give() -> None:
    root = BENCHMARKS.parent
    command = [sys.executable, str(BENCHMARKS / "gpu_table.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.splitlines()
    table, found = "\n".join(printed[:-1]), json.loads(printed[-1])
    assert table in (root / "README.md").read_text(encoding="utf-8")
    assert found["instruct_mixtral"]["8GB"] < 8e9 < found["instruct_mixtral"]["as_in_recipe"], "experts offloaded"
    assert found["instruct"]["8GB"] == found["instruct"]["as_in_recipe"] < 8e9
