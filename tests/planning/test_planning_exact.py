"""Weights, adapter, gradients, optimiser state and the size of an adapter's file, to the byte, in every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lola_ft import load_base
from lola_ft.adapters import AdapterSettings, fitting_layout, save_adapter
from lola_ft.checkpoints.base_checkpoint import open_config
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.planning import Job, predict
from lola_ft.planning.adapter_sizes import adapter_sizes
from lola_ft.planning.base_weights import base_audit
from lola_ft.quantization import audit
from lola_ft.training.trainers.arguments import _OPTIMIZERS
from tests.grids import slow_but
from tests.planning.conftest import FAMILIES, ODD, Batch, adapted, make, make_batch

SETTINGS: dict[str, AdapterSettings] = {
    "both": AdapterSettings(attention_rank=4, mlp_rank=8),
    "attention": AdapterSettings(attention_rank=64),
    "mlp": AdapterSettings(mlp_rank=3, rslora=True),
    "norms": AdapterSettings(attention_rank=2, tune_norms=True),
    "biases": AdapterSettings(tune_biases=True),
    "norms and biases": AdapterSettings(mlp_rank=2, tune_biases=True, tune_norms=True),
    "dora": AdapterSettings(attention_rank=4, mlp_rank=4, dora=True),
}
OF_EXPERTS: dict[str, AdapterSettings] = {
    "everything": AdapterSettings(attention_rank=4, mlp_rank=8, expert_rank=16),
    "some experts": AdapterSettings(mlp_rank=3, expert_rank=16, selection=((0, 2, 3), (1,))),
    "a layer without experts": AdapterSettings(expert_rank=8, selection=((), (0, 1, 2, 3))),
    "router tuned": AdapterSettings(expert_rank=16, tune_router=True),
    "router LoRA": AdapterSettings(attention_rank=2, router_rank=8),
    "some biases": AdapterSettings(expert_rank=8, tune_biases=True, tune_norms=True, selection=((0, 2), (1,))),
    "dora and experts": AdapterSettings(attention_rank=4, mlp_rank=4, expert_rank=8, dora=True),
    "dora, some experts": AdapterSettings(mlp_rank=4, expert_rank=8, dora=True, selection=((0,), (1, 2))),
}
ADAPTERS = [(family, name) for family in FAMILIES for name in SETTINGS] + [("lola", name) for name in OF_EXPERTS]
BASES: list[tuple[str, dict[str, Any]]] = [
    *ODD.items(),
    ("lola", {"n_inner": 200, "n_embd": 40, "num_experts": 3}),
    ("lola", {"n_layer": 1}),
    ("gpt2", {"tie_word_embeddings": False}),
]
FORMATS: list[tuple[str | None, str]] = [("nf4", "float32"), ("nf4", "bfloat16"), (None, "float16")]
IN_FORMATS = [(*base, *form) for base in BASES for form in FORMATS]
FAST_IN_FORMATS = [case for case in IN_FORMATS if case[2:] == FORMATS[0] or case[:2] == ("lola", ODD["lola"])]
IN_4_BIT_OR_NOT = [(*adapter, quantization) for adapter in ADAPTERS for quantization in ("nf4", None)]
FAST_IN_4_BIT_OR_NOT = [
    *(("lola", name, "nf4") for name in ("both", *OF_EXPERTS)),
    *((family, name, "nf4") for family in FAMILIES if family != "lola" for name in ("norms and biases", "dora")),
    ("lola", "everything", None),
]


@pytest.mark.parametrize(("family", "changes", "quantization", "dtype"), slow_but(FAST_IN_FORMATS, IN_FORMATS))
def test_a_base_is_planned_as_its_audit_counts_it(
    family: str, changes: dict[str, Any], quantization: str | None, dtype: str, tmp_path: Path
) -> None:
    base = make(tmp_path / "base", family, **changes)
    counted = audit(load_base(base, quantization, dtype, "cpu", quiet=True))
    planned = base_audit(open_config(base)[1], quantization, dtype)
    assert planned.as_dict() == counted.as_dict()
    assert planned.total_bytes == counted.total_bytes


@pytest.mark.parametrize(("family", "name", "quantization"), slow_but(FAST_IN_4_BIT_OR_NOT, IN_4_BIT_OR_NOT))
def test_adapter_and_gradients_are_planned_to_the_byte(
    family: str, name: str, quantization: str | None, odd_bases: Callable[..., Path], tmp_path: Path
) -> None:
    settings = (SETTINGS | OF_EXPERTS)[name]
    model = adapted(odd_bases(family), quantization, "float32", settings)
    architecture = architecture_of(model.config)
    planned = predict(Job(architecture, settings, quantization, "float32", "cpu"))
    assert planned.parts["weights"] + planned.parts["adapter"] == audit(model).total_bytes
    model(**make_batch(Batch(packing=architecture.family.packs)), skip_logits=True).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    numels = sorted(gradient.numel() for gradient in gradients)
    assert sorted(adapter_sizes(architecture, settings).numels) == numels
    assert planned.parts["gradients"] == sum(gradient.nbytes for gradient in gradients)
    folder = save_adapter(model, tmp_path / "adapter", fitting_layout(model))
    assert planned.fixed.adapter_file == (folder / "adapter_model.safetensors").stat().st_size


def test_an_adapter_on_what_the_base_lacks_is_refused(odd_bases: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"adapter\.experts.*GPT-2.*no experts.*attention, mlp"):
        predict(Job(open_config(odd_bases("gpt2"))[1], AdapterSettings(expert_rank=4)))


OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop", "adagrad", "sgd")


@pytest.mark.parametrize(
    ("family", "optimizer"),
    slow_but(
        [("lola", "adamw"), ("lola", "paged_adamw_8bit"), ("lola", "rmsprop"), ("bloom", "adamw_8bit")],
        [*(("lola", name) for name in OPTIMIZERS), ("bloom", "adamw"), ("bloom", "adamw_8bit")],
    ),
)
def test_optimiser_state_is_planned_to_the_byte(family: str, optimizer: str, tmp_path: Path) -> None:
    """Each tensor's own size counts: small ones stay in float32, the others have scales."""
    settings = SETTINGS["both"] if family == "bloom" else OF_EXPERTS["some experts"]
    model = adapted(make(tmp_path / "base", family), "nf4", "float32", settings)
    architecture = architecture_of(model.config)
    arguments = TrainingArguments(str(tmp_path), optim=_OPTIMIZERS.get(optimizer, optimizer), use_cpu=True)
    make_optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    real = make_optimizer(trained, **options)
    model(**make_batch(Batch(packing=architecture.family.packs)), skip_logits=True).loss.backward()
    real.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in real.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    planned = predict(Job(architecture, settings, "nf4", "float32", "cpu", optimizer=optimizer)).fixed.optimizer
    assert planned.exact
    assert planned.state + planned.paged == sum(storages.values())


def test_paged_state_is_what_may_leave_a_gpu(make_config: Any) -> None:
    settings = AdapterSettings(expert_rank=64)
    architecture = architecture_of(make_config(n_embd=512, n_inner=1024))
    plain, paged = (
        predict(Job(architecture, settings, optimizer=name)).fixed.optimizer
        for name in ("adamw_8bit", "paged_adamw_8bit")
    )
    assert plain.paged == 0
    assert plain.state == paged.state + paged.paged
    assert paged.paged == 2 * predict(Job(architecture, settings)).fixed.trained  # two bytes each, without scales
