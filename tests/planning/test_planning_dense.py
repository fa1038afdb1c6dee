"""Plans of dense baselines: sizes to the byte, activations against what autograd saves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer, TrainingArguments

from lola_ft import merge
from lola_ft.adapters import AdapterSettings
from lola_ft.baseline.adapter import add_dense_adapter, save_dense_adapter
from lola_ft.baseline.checkpoint import read_dense_config
from lola_ft.baseline.load import load_dense
from lola_ft.planning import Job, predict
from lola_ft.planning.dense.activations import dense_activations, kept_by_activation
from lola_ft.planning.dense.base import dense_audit
from lola_ft.planning.dense.config import DenseConfig
from lola_ft.planning.dense.files import dense_adapter, dense_merged_files
from lola_ft.planning.dense.workspace import dense_backward_work
from lola_ft.quantization import audit
from lola_ft.training.trainers.arguments import _OPTIMIZERS
from tests.baseline.conftest import make_dense
from tests.planning.conftest import Batch, job_of, make_batch

KINDS = ("gpt2", "bloom")
# Sizes that are no multiples of one another: of GPT-2 the inner one too, which BLOOM has no choice of.
ODD = {"gpt2": {"n_embd": 40, "n_layer": 3, "n_inner": 200}, "bloom": {"hidden_size": 40, "n_layer": 3}}
DROPOUTS = {
    "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}
SETTINGS = {
    "both": AdapterSettings(attention_rank=4, mlp_rank=8),
    "attention": AdapterSettings(attention_rank=64),
    "mlp": AdapterSettings(mlp_rank=3, dropout=0.1, rslora=True),
}
# The loss keeps its divisor, and a mask that is a token shorter a row.
TOLERANCE = 0.005
# Work space is an estimate, and gradients of factors come and go.
WORK_TOLERANCE = 0.10


def adapted(base: Path, quantization: str | None, dtype: str, settings: AdapterSettings) -> Any:
    return add_dense_adapter(load_dense(base, quantization, dtype, "cpu", quiet=True), settings).train()


def config_of(base: Path) -> DenseConfig:
    return DenseConfig.of(read_dense_config(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), (None, "float16")])
def test_a_base_is_planned_as_its_audit_counts_it(
    kind: str, quantization: str | None, dtype: str, tmp_path: Path
) -> None:
    base = make_dense(tmp_path / "base", kind, **ODD[kind])
    counted = audit(load_dense(base, quantization, dtype, "cpu", quiet=True))
    planned = dense_audit(config_of(base), quantization, dtype)
    assert planned.as_dict() == counted.as_dict()
    assert planned.total_bytes == counted.total_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("name", SETTINGS)
def test_adapter_and_gradients_are_planned_to_the_byte(
    name: str, quantization: str | None, kind: str, tmp_path: Path
) -> None:
    base = make_dense(tmp_path / "base", kind, **ODD[kind])
    model = adapted(base, quantization, "float32", SETTINGS[name])
    planned = predict(Job(config_of(base), SETTINGS[name], quantization, "float32", "cpu"))
    assert planned.parts["weights"] + planned.parts["adapter"] == audit(model).total_bytes
    model(**make_batch(Batch(packing=False)), skip_logits=True).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert dense_adapter(config_of(base), SETTINGS[name]).numels == [gradient.numel() for gradient in gradients]
    assert planned.parts["gradients"] == sum(gradient.nbytes for gradient in gradients)
    folder = save_dense_adapter(model, tmp_path / "adapter")
    assert planned.fixed.adapter_file == (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "sgd"])
def test_optimiser_state_is_planned_to_the_byte(optimizer: str, tmp_path: Path) -> None:
    """Each tensor's own size counts: small ones stay in float32, the others have scales."""
    base = make_dense(tmp_path / "base", "bloom", hidden_size=64)
    settings = AdapterSettings(attention_rank=16, mlp_rank=32)
    model = adapted(base, "nf4", "float32", settings)
    arguments = TrainingArguments(str(tmp_path), optim=_OPTIMIZERS.get(optimizer, optimizer), use_cpu=True)
    make, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    real = make([parameter for parameter in model.parameters() if parameter.requires_grad], **options)
    model(**make_batch(Batch(packing=False)), skip_logits=True).loss.backward()
    real.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in real.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    planned = predict(Job(config_of(base), settings, "nf4", "float32", "cpu", optimizer=optimizer)).fixed.optimizer
    assert planned.exact
    assert planned.state == sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_merged_files_are_planned_to_the_byte(
    dtype: str, shard: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_dense(tmp_path / "base", kind, **ODD[kind])
    _store_in_half(base)
    monkeypatch.setattr("lola_ft.merging.dense.MERGED_SHARD", shard)
    monkeypatch.setattr("lola_ft.planning.dense.files.MERGED_SHARD", shard)
    model = adapted(base, None, "float32", SETTINGS["both"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.1)
    merge(base, save_dense_adapter(model, tmp_path / "adapter"), tmp_path / "merged", dtype=dtype, check="none")
    wanted = None if dtype == "auto" else torch.bfloat16
    planned = dense_merged_files(base, config_of(base), wanted)
    assert planned == {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert (len(planned) > 1) == (shard == "60KB")
    (base / "model.safetensors").unlink()
    assert dense_merged_files(base, config_of(base), wanted) == planned, "from the config alone"


BATCHES = {
    "packed": Batch(2, 64),
    "padded": Batch(3, 40, packing=False),
    "one row": Batch(1, 100, packing=False),
    "checkpointed": Batch(3, 40, packing=False, checkpointing=True),
    "packed, checkpointed": Batch(2, 64, checkpointing=True),
}
ACTIVATIONS = [
    (kind, batch, name, dropout)
    for kind in KINDS
    for batch in BATCHES
    for name in SETTINGS
    for dropout in (False, True)
    if kind == "gpt2" or not BATCHES[batch].packing
]


@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "float32"), (None, "float32"), ("nf4", "bfloat16")])
@pytest.mark.parametrize(("kind", "batch_name", "name", "dropout"), ACTIVATIONS)
def test_saved_tensors_are_as_planned(
    kind: str,
    batch_name: str,
    name: str,
    dropout: bool,
    quantization: str | None,
    dtype: str,
    tmp_path: Path,
    saved_bytes: Callable[[Any, Batch, bool], int],
) -> None:
    base = make_dense(tmp_path / "base", kind, **ODD[kind], **(DROPOUTS[kind] if dropout else {}))
    batch, settings = BATCHES[batch_name], SETTINGS[name]
    planned = dense_activations(job_of(config_of(base), settings, quantization, dtype, batch)).saved
    real = saved_bytes(adapted(base, quantization, dtype, settings), batch, dtype == "bfloat16")
    assert planned == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_unquantised_16_bit_layers_save_what_is_planned(
    kind: str, tmp_path: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    base = make_dense(tmp_path / "base", kind, **ODD[kind])
    for settings in SETTINGS.values():
        real = saved_bytes(adapted(base, None, "bfloat16", settings), BATCHES["padded"], True)
        planned = dense_activations(job_of(config_of(base), settings, None, "bfloat16", BATCHES["padded"])).saved
        assert planned == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_layer_saves_what_it_saves_without_checkpointing(
    kind: str, tmp_path: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    batch, settings = BATCHES["padded"], SETTINGS["both"]
    base = make_dense(tmp_path / "base", kind, **ODD[kind])
    whole = {}
    for layers in (2, 3):
        model = adapted(base, "nf4", "float32", settings)
        model.get_base_model().transformer.h = model.get_base_model().transformer.h[:layers]
        whole[layers] = saved_bytes(model, batch, False)
    job = job_of(config_of(base), settings, "nf4", "float32", replace(batch, checkpointing=True))
    block_input = job.tokens * job.config.n_embd * 4
    assert dense_activations(job).recomputed + block_input == whole[3] - whole[2]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"])
def test_gpt2s_of_any_activation_are_planned(
    activation: str, tmp_path: Path, saved_bytes: Callable[[Any, Batch, bool], int]
) -> None:
    base = make_dense(tmp_path / "base", "gpt2", activation_function=activation)
    real = saved_bytes(adapted(base, "nf4", "float32", SETTINGS["both"]), Batch(), False)
    planned = dense_activations(job_of(config_of(base), SETTINGS["both"], "nf4", "float32", Batch())).saved
    assert planned == pytest.approx(real, rel=TOLERANCE)
    assert kept_by_activation("gelu_new") == 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_of_the_backward_pass_is_as_planned(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    sizes = {"gpt2": {"n_embd": 128}, "bloom": {"hidden_size": 128}}[kind]
    base, settings = make_dense(tmp_path / "base", kind, **sizes), SETTINGS["both"]
    batch = Batch(4, 128, packing=False, checkpointing=checkpointing)
    model = adapted(base, None, "float32", settings)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model(**make_batch(batch), use_cache=False, skip_logits=True).loss.backward()  # makes the gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(**make_batch(batch), use_cache=False, skip_logits=True).loss
        with record_function("way back"):
            loss.backward()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "way back")
    held = peak = 0
    for event in events:
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held) if event.start_ns() > began else 0
    job = job_of(config_of(base), settings, None, "float32", batch)
    kept = dense_activations(job)
    assert kept.saved + kept.held + kept.recomputed + dense_backward_work(job) == pytest.approx(
        peak, rel=WORK_TOLERANCE
    )


def _store_in_half(base: Path) -> None:
    file = base / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
