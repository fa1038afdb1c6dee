"""Weights, adapter, gradients, optimiser state and file sizes, to the byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lola_ft import merge
from lola_ft.adapters import AdapterSettings, fitting_layout, save_adapter
from lola_ft.model.config import LolaConfig
from lola_ft.planning import Job, predict
from lola_ft.planning.base import base_audit
from lola_ft.planning.merged import merged_files
from lola_ft.quantization import audit, load_base
from lola_ft.training.trainers.arguments import _OPTIMIZERS
from tests.conftest import make_base
from tests.planning.conftest import Batch, adapted, make_batch

SETTINGS: dict[str, AdapterSettings] = {
    "everything": AdapterSettings(attention_rank=4, mlp_rank=8, expert_rank=16),
    "attention": AdapterSettings(attention_rank=64),
    "some experts": AdapterSettings(mlp_rank=3, expert_rank=16, selection=((0, 2, 3), (1,))),
    "a layer without experts": AdapterSettings(expert_rank=8, selection=((), (0, 1, 2, 3))),
    "router tuned": AdapterSettings(expert_rank=16, tune_router=True),
    "router LoRA": AdapterSettings(attention_rank=2, router_rank=8),
    "norms": AdapterSettings(attention_rank=2, tune_norms=True),
    "biases": AdapterSettings(tune_biases=True),
    "some biases": AdapterSettings(expert_rank=8, tune_biases=True, tune_norms=True, selection=((0, 2), (1,))),
    "dora": AdapterSettings(attention_rank=4, mlp_rank=4, expert_rank=8, dora=True),
    "dora, some experts": AdapterSettings(mlp_rank=4, expert_rank=8, dora=True, selection=((0,), (1, 2))),
}


@pytest.mark.parametrize("changes", [{}, {"n_inner": 200, "n_embd": 40, "num_experts": 3}, {"n_layer": 1}])
@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), (None, "bfloat16")])
def test_a_base_is_planned_as_its_audit_counts_it(
    changes: dict[str, Any], quantization: str | None, dtype: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", **changes)
    counted = audit(load_base(base, quantization, dtype, "cpu", quiet=True))
    planned = base_audit(LolaConfig.from_pretrained(base), quantization, dtype)
    assert planned.as_dict() == counted.as_dict()
    assert planned.total_bytes == counted.total_bytes


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_adapter_and_gradients_are_planned_to_the_byte(
    name: str, quantization: str | None, odd_base: Path, tmp_path: Path
) -> None:
    settings = SETTINGS[name]
    model = adapted(odd_base, quantization, "float32", settings)
    planned = predict(Job(model.config, settings, quantization, "float32", "cpu"))
    assert planned.parts["weights"] + planned.parts["adapter"] == audit(model).total_bytes
    model(**make_batch(Batch()), skip_logits=True).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert planned.parts["gradients"] == sum(gradient.nbytes for gradient in gradients)
    folder = save_adapter(model, tmp_path / "adapter", fitting_layout(model))
    assert planned.fixed.adapter_file == (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop", "adagrad", "sgd"],
)
def test_optimiser_state_is_planned_to_the_byte(optimizer: str, odd_base: Path, tmp_path: Path) -> None:
    settings = SETTINGS["some experts"]
    model = adapted(odd_base, "nf4", "float32", settings)
    arguments = TrainingArguments(str(tmp_path), optim=_OPTIMIZERS.get(optimizer, optimizer), use_cpu=True)
    make, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    real = make(trained, **options)
    model(**make_batch(Batch()), skip_logits=True).loss.backward()
    real.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in real.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    planned = predict(Job(model.config, settings, "nf4", "float32", "cpu", optimizer=optimizer)).fixed.optimizer
    assert planned.exact
    assert planned.state + planned.paged == sum(storages.values())


def test_paged_state_is_what_may_leave_a_gpu(make_config: Any) -> None:
    settings = AdapterSettings(expert_rank=64)
    config = make_config(n_embd=512, n_inner=1024)
    plain, paged = (
        predict(Job(config, settings, optimizer=name)).fixed.optimizer for name in ("adamw_8bit", "paged_adamw_8bit")
    )
    assert plain.paged == 0
    assert plain.state == paged.state + paged.paged
    assert paged.paged == 2 * predict(Job(config, settings)).fixed.trained  # two bytes a number, without scales


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_merged_files_are_planned_to_the_byte(dtype: str, tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", dtype=dtype, check="none")
    config = LolaConfig.from_pretrained(tiny_base)
    wanted = None if dtype == "auto" else torch.bfloat16
    planned = merged_files(tiny_base, config, wanted)
    assert planned == {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    assert merged_files(tmp_path, config, wanted) == planned, "from the config alone"
