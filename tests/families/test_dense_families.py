"""Dense families on the same path as LOLA: trained, stored, opened, merged. Missing features are refused."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.errors import AdapterError, CheckpointError, UserError
from lola_ft.kernels.loss import labelled_cross_entropy
from lola_ft.open_model import open_model
from lola_ft.quantization import NF4Linear, quantize_base
from lola_ft.quantization.nf4 import quantize
from lola_ft.recipe import load_recipe
from lola_ft.training import train
from lola_ft.training.reports.metrics import read_metrics
from tests.families.conftest import make_dense, write_recipe
from tests.grids import slow_but

KINDS = ("gpt2", "bloom")
GRID = slow_but(["gpt2"], KINDS)
FILE = "model.safetensors"
IDS = torch.tensor([[20, 30, 40, 50, 60, 70]])


@pytest.fixture(scope="module", params=GRID)
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    dense_bases: dict[str, Path],
    rows_file: Path,
) -> tuple[Path, Path]:
    """The folders of a finished run on a 4-bit base, and of the base."""
    folder = tmp_path_factory.mktemp(request.param)
    base = dense_bases[request.param]
    return train(load_recipe(write_recipe(folder / "recipe.yaml", base, rows_file))), base


@pytest.mark.slow
def test_a_run_lowers_the_loss_and_records_what_it_trained(run: tuple[Path, Path]) -> None:
    folder, base = run
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["base"]["family"] == base.name
    assert manifest["trained"]["attention"]["parameters"] == 2 * 4 * (64 + 192 + 64 + 64)
    assert manifest["trained"]["mlp"]["parameters"] == 2 * 8 * 2 * (64 + 256)
    assert manifest["base"]["parts"]["attention nf4"]["parameters"] == 2 * 4 * 64 * 64
    assert (folder / "checkpoints" / "step-12" / "adapter" / "adapter_config.json").is_file()
    assert "CC BY" not in (folder / "README.md").read_text()  # LOLA's licence is not this base's


def test_stock_peft_gets_the_same_logits(run: tuple[Path, Path]) -> None:
    folder, base = run
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    ours = open_model(folder, quantization="none", dtype="float32", device="cpu").model
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)
        assert (ours(IDS).logits - plain(IDS).logits).abs().max() > 0.1


@pytest.mark.slow
def test_merge_equals_base_plus_adapter(run: tuple[Path, Path], verb: Callable[..., Any], tmp_path: Path) -> None:
    folder, base = run
    outcome = verb("merge", folder, "--out", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["applied"] == report["adapter_tensors"] == 16
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = open_model(folder, quantization="none", dtype="float32", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)  # another order
    assert set(load_file(tmp_path / "merged" / FILE)) == set(load_file(base / FILE))
    opened = open_model(tmp_path / "merged", dtype="float32", device="cpu")
    assert opened.subject.kind == "merged"
    assert opened.template is not None
    proof = report["weights"]
    assert (proof["applied_once"], proof["touched"], proof["untouched"]) == (16, 8, len(load_file(base / FILE)) - 8)


@pytest.mark.slow
def test_merge_into_rounded_weights_equals_the_four_bit_base_plus_adapter(
    run: tuple[Path, Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = verb("merge", run[0], "--out", tmp_path / "merged", "--rounding", "nf4")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["rounded"] == 0  # all 8 have LoRA
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = open_model(run[0], quantization="nf4", dtype="float32", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)  # another order


def test_an_opened_run_has_the_4_bit_base_of_training(run: tuple[Path, Path]) -> None:
    opened = open_model(run[0], dtype="float32", device="cpu")
    layers = [module for module in opened.model.modules() if isinstance(module, NF4Linear)]
    assert len(layers) == 8
    assert opened.model.get_base_model().quantization == "nf4"


@pytest.mark.slow
def test_a_run_is_evaluated_and_answers(
    run: tuple[Path, Path], rows_file: Path, verb: Callable[..., Any], tmp_path: Path
) -> None:
    folder, base = run
    common = ("--data", rows_file, "--format", "alpaca", "--task", "loss", "--out", tmp_path / "evaluation")
    outcome = verb("evaluate", folder, base, *common)
    assert outcome.code == 0, outcome.err
    said = verb("generate", folder, "--prompt", "Name 3", "--max-new-tokens", "4")
    assert said.code == 0, said.err


@pytest.mark.parametrize("kind", GRID)
def test_four_bit_layers_hold_the_stored_weights(kind: str, dense_bases: dict[str, Path]) -> None:
    """Each layer's dense weight is the rounded stored one, not transposed. (A square weight hides a transposition.)"""
    model = lola_ft.load_base(dense_bases[kind], "nf4", "float32", "cpu", quiet=True)
    plain = AutoModelForCausalLM.from_pretrained(dense_bases[kind])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(layers) == 8
    for name, layer in layers.items():
        stored = plain.get_submodule(name).weight.data
        expected = stored.t() if kind == "gpt2" else stored
        assert torch.equal(layer.stored().packed, quantize(expected).packed), name
        torch.testing.assert_close(layer.dense_weight(torch.float32), expected, atol=0.12, rtol=0)  # 4-bit rounding
        assert torch.equal(layer.bias, plain.get_submodule(name).bias)


@pytest.mark.parametrize("kind", GRID)
def test_the_loss_is_that_of_the_labelled_rows(kind: str, dense_bases: dict[str, Path]) -> None:
    model = lola_ft.load_base(dense_bases[kind], None, "float32", "cpu", quiet=True)
    plain = AutoModelForCausalLM.from_pretrained(dense_bases[kind]).eval()
    labels = torch.tensor([[-100, -100, 40, 50, -100, 70]])
    with torch.no_grad():
        loss = model(input_ids=IDS, labels=labels, skip_logits=True).loss
        torch.testing.assert_close(loss, plain(input_ids=IDS, labels=labels).loss)
        halved = model(input_ids=IDS, labels=labels, skip_logits=True, num_items_in_batch=6)
    torch.testing.assert_close(halved.loss, loss / 2)
    assert halved.logits is None


def test_packed_documents_do_not_see_each_other(dense_bases: dict[str, Path]) -> None:
    model = lola_ft.load_base(dense_bases["gpt2"], "nf4", "float32", "cpu", quiet=True)
    second = torch.tensor([[81, 82, 83, 84]])
    packed, positions = torch.cat([IDS, second], 1), torch.tensor([[*range(6), *range(4)]])
    labels = torch.cat([torch.full_like(IDS, -100), second], 1)
    labels[0, 6] = -100
    with torch.no_grad():
        together = model(
            input_ids=packed, position_ids=positions, labels=labels, use_cache=False, skip_logits=True
        ).loss
        x_BSD = model.transformer(second, use_cache=False).last_hidden_state
        alone = labelled_cross_entropy(x_BSD, model.lm_head.weight, second)
    torch.testing.assert_close(together, alone)


def test_rows_of_a_bloom_are_not_packed(dense_recipe: Callable[..., Path], verb: Callable[..., Any]) -> None:
    outcome = verb("train", dense_recipe("bloom"), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "Rows are not packed" in outcome.out
    refused = verb("train", dense_recipe("bloom"), "data.packing=true", "--dry-run")
    assert refused.code == 2
    assert "data.packing: transformers' attention of BLOOM models cannot keep packed documents apart" in refused.err


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(run: tuple[Path, Path], rows_file: Path, tmp_path: Path) -> None:
    folder, base = run
    shutil.copytree(folder, tmp_path / "run")
    for name in ("manifest.json", "README.md", "loss.png"):
        (tmp_path / "run" / name).unlink()
    for name in ("adapter", "checkpoints/step-12"):
        shutil.rmtree(tmp_path / "run" / name)
    again = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", base, rows_file)), resume=True)
    assert json.loads((again / "manifest.json").read_text())["timings"]["resumed_from_step"] == 6
    file = Path("adapter") / "adapter_model.safetensors"
    assert (again / file).read_bytes() == (folder / file).read_bytes()


# The change of a recipe, the key in the message, and the missing feature.
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "experts": ({"adapter": {"experts": {"rank": 4}}}, ("adapter.experts: ", "no experts")),
    "router": ({"router": {"mode": "tuned"}}, ("router.mode: ", "no router")),
    "both": (
        {"router": {"mode": "lora"}, "adapter": {"experts": {"rank": 4}}},
        ("adapter.experts, router.mode: ", "no experts and no router"),
    ),
    "aux loss": ({"router": {"aux_loss": 0.01}}, ("router.aux_loss: ", "no router")),
    "z loss": ({"router": {"z_loss": 0.01}}, ("router.z_loss: ", "no router")),
    "too long": ({"data": {"max_length": 256}}, ("data.max_length: ", "the 128 learned positions")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_missing_feature_is_refused_with_the_existing_ones(
    case: str, dense_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    changes, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        train(load_recipe(dense_recipe("gpt2", **changes)), dry_run=True)
    message = str(caught.value)
    assert all(part in message for part in expected), message
    assert "max_length" in message or "It has attention, mlp, norms, biases." in message
    assert not (tmp_path / "run").exists()


def test_other_kinds_of_models_are_refused(
    dense_recipe: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "t5"}')
    for outcome in (
        verb("train", dense_recipe(), f"base.model={other}"),
        verb("merge", tmp_path, "--base", other, "--out", tmp_path / "merged"),
        verb("evaluate", other, "--data", "rows.jsonl"),
    ):
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
    with pytest.raises(
        CheckpointError,
        match=r"model_type is 't5', which is not supported.*LOLA \(lola_v1\), OLMoE \(olmoe\), .*GPT-2 \(gpt2\), BLOOM",
    ):
        open_model(other)


def test_a_run_needs_the_planned_disk_and_memory(
    run: tuple[Path, Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = run
    outcome = verb("plan", folder / "recipe.yaml", "--json")
    assert outcome.code == 0, outcome.err
    planned, manifest = json.loads(outcome.out), json.loads((folder / "manifest.json").read_text())
    assert planned["adapter_file_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert planned["weights"] == manifest["base"]["parts"]
    trained = sum(count["parameters"] for count in manifest["trained"].values())
    assert planned["trained_parameters"] == trained
    assert planned["parts"]["gradients"] == 4 * trained
    assert verb("merge", folder, "--out", tmp_path / "merged", "--check", "none").code == 0
    written = {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert planned["merged_file_bytes"] == written


def test_routing_of_a_family_without_experts_is_refused(
    dense_recipe: Callable[..., Path], dense_bases: dict[str, Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "en.txt").write_text("one two three\n")
    profiled = verb("routing", "profile", dense_bases["gpt2"], "--data", tmp_path / "en.txt", "--out", tmp_path / "p")
    assert (profiled.code, "no experts" in profiled.err) == (2, True)
    shown = verb("preview", dense_recipe("bloom"))
    assert shown.code == 0, shown.err


def test_damaged_weights_are_named(dense_bases: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense_bases["gpt2"], broken)
    state = load_file(broken / FILE)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({key: value for key, value in state.items() if key != name}, broken / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weights that config.json calls for are missing: {name}"):
        lola_ft.load_base(broken, None, "float32", "cpu", quiet=True)
    state[name][0, 0] = float("nan")
    save_file(state, broken / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}' holds NaN"):
        lola_ft.load_base(broken, "nf4", "float32", "cpu", quiet=True)


def test_an_adapter_of_another_base_is_refused(
    run: tuple[Path, Path], dense_bases: dict[str, Path], verb: Callable[..., Any]
) -> None:
    folder, base = run
    other = next(path for kind, path in dense_bases.items() if kind != base.name)
    outcome = verb("merge", folder, "--base", other, "--out", folder / "other")
    assert outcome.code == 2
    assert "was trained on base" in outcome.err
    assert not (folder / "other").exists()
    allowed = verb("merge", folder, "--base", other, "--out", folder / "other", "--allow-other-base")
    assert allowed.code == 2
    assert "does not fit this base" in allowed.err


OPTIONS: dict[str, dict[str, Any]] = {
    "norms": {"norms": True},
    "biases": {"biases": True},
    "norms and biases": {"norms": True, "biases": True},
    "dora": {"variant": "dora"},
    "rslora": {"variant": "rslora"},
    "loftq": {"init": "loftq"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kind"), itertools.product(OPTIONS, KINDS))
def test_every_option_trains_is_stored_and_merged(
    option: str, kind: str, dense_recipe: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = {"attention": {"rank": 4}, "mlp": {"rank": 4}, "alpha": 8, "dropout": 0.0} | OPTIONS[option]
    recipe = dense_recipe(kind, adapter=adapter, train={"max_steps": 3, "save_every": 0})
    run = train(load_recipe(recipe))
    quantization = "nf4" if option == "loftq" else "none"
    adapted = open_model(run, quantization=quantization, dtype="float32", device="cpu").model
    outcome = verb("merge", run, "--out", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["applied"] == report["adapter_tensors"] == report["weights"]["applied_once"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)  # another order
    if option != "loftq":  # a LoftQ adapter belongs to the rounded base
        stock = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(load_recipe(recipe).base.model), run / "adapter"
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(stock(IDS).logits, adapted(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRID)
def test_a_quantised_base_is_cached_and_merged_into(
    kind: str, dense_bases: dict[str, Path], run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run[1].name != kind:
        pytest.skip("the run is of another family")
    monkeypatch.setenv("LOLA_FT_CACHE", str(tmp_path / "cache"))
    fresh = lola_ft.load_base(dense_bases[kind], "nf4", "float32", "cpu", quiet=True)
    kept = quantize_base(dense_bases[kind], "float32", quiet=True)
    again = lola_ft.load_base(kept, "nf4", "float32", "cpu", quiet=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, fresh(IDS).logits)
    assert again.base_fingerprint == fresh.base_fingerprint
    report = lola_ft.merge(kept, run[0] / "adapter", tmp_path / "merged")
    assert report.base_kind == "nf4"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = lola_ft.load_adapter(again, run[0] / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)  # another order


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRID)
def test_a_base_saved_without_its_prefix_keeps_its_names(
    kind: str, dense_bases: dict[str, Path], run: tuple[Path, Path], tmp_path: Path
) -> None:
    """The Hub's gpt2 and bloom are saved like this, with names of the backbone."""
    if run[1].name != kind:
        pytest.skip("the run is of another family")
    bare = Path(shutil.copytree(dense_bases[kind], tmp_path / "bare"))
    state = load_file(bare / FILE)
    save_file(
        {name.removeprefix("transformer."): value for name, value in state.items()}, bare / FILE, {"format": "pt"}
    )
    with torch.no_grad():
        loaded, expected = (
            lola_ft.load_base(path, "nf4", "float32", "cpu", quiet=True)(IDS).logits for path in (bare, run[1])
        )
    assert torch.equal(loaded, expected)
    report = lola_ft.merge(bare, run[0] / "adapter", tmp_path / "merged", allow_other_base=True)
    assert report.applied == 16
    assert set(load_file(tmp_path / "merged" / FILE)) == set(load_file(bare / FILE))


def test_a_gpt2_with_4096_positions_trains_on_long_rows(
    dense_recipe: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_dense(tmp_path / "long", "gpt2", n_positions=4096)
    outcome = verb("train", dense_recipe("gpt2"), f"base.model={base}", "data.max_length=4096", "--dry-run")
    assert outcome.code == 0, outcome.err
    outcome = verb("train", dense_recipe("gpt2"), f"base.model={base}", "data.max_length=4097", "--dry-run")
    assert (outcome.code, "the 4096 learned positions" in outcome.err) == (2, True)


def test_a_config_without_a_size_is_named(dense_bases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense_bases["gpt2"], tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["n_embd"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json lacks n_embd"):
        lola_ft.load_base(folder, quiet=True)


def test_an_adapter_of_another_family_is_refused(run: tuple[Path, Path], tiny_base: Path) -> None:
    model = lola_ft.load_base(tiny_base, None, "float32", "cpu", quiet=True)
    with pytest.raises(AdapterError):
        lola_ft.load_adapter(model, run[0] / "adapter")
