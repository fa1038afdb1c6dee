"""Adapters of mixtures of experts in both layouts. The reference is stock PEFT on stock transformers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.adapters import AdapterSettings, add_adapter, lora_config
from lola_ft.adapters.convert import convert_adapter
from lola_ft.adapters.loftq import start_at_rounding_error
from lola_ft.adapters.on_disk import read_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import AdapterError, UserError
from lola_ft.quantization import load_base
from tests.families.conftest import random_adapter
from tests.families.moe import KINDS

IDS = torch.randint(6, 320, (2, 13), generator=torch.Generator().manual_seed(1))
FILE = "adapter_model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:The following")  # PEFT applies patterns that its warning calls ignored
every_kind = pytest.mark.parametrize("kind", KINDS)


def stock_peft(base: Path, adapter: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(adapter), **options).eval()


def ours_with(base: Path, adapter: Path, **options: Any) -> Any:
    model = load_base(base, None, "float32", "cpu", quiet=True)
    return lola_ft.load_adapter(model, adapter, allow_other_base=True, **options).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@every_kind
def test_stock_peft_computes_the_same_logits_and_gradients(
    kind: str, moe_bases: dict[str, Path], moe_adapters: dict[str, Path]
) -> None:
    stock = stock_peft(moe_bases[kind], moe_adapters[kind], is_trainable=True)
    ours = ours_with(moe_bases[kind], moe_adapters[kind], trainable=True)
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-5, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(moe_bases[kind], dtype=torch.float32).eval()
    assert (logits(ours) - logits(plain)).abs().max() > 0.05
    for model in (stock, ours):
        model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys()
    groups = {
        "attn": "attention",
        "shared_": "shared_experts",
        "experts": "experts",
        ".gate.": "router",
        ".router.": "router",
    }
    assert {group for mark, group in groups.items() if any(mark in name for name in found)} == {
        group for group in KINDS[kind].groups if group != "mlp"
    }
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-3, msg=name)


@every_kind
@pytest.mark.parametrize("settings", [{"rslora": True}, {"tune_router": True, "tune_norms": True}], ids=str)
def test_other_forms_load_with_stock_peft_too(
    kind: str, settings: dict[str, Any], moe_bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = random_adapter(moe_bases[kind], kind, tmp_path / "adapter", **settings)
    ours, stock = ours_with(moe_bases[kind], adapter), stock_peft(moe_bases[kind], adapter)
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-5, rtol=1e-4)
    if "tune_router" in settings:
        tuned = {name for name in load_file(adapter / FILE) if "gate." in name or "router." in name}
        assert tuned
        assert not any("shared_expert_gate" in name for name in tuned)  # its gate is frozen


@every_kind
def test_a_conversion_loses_nothing(
    kind: str, moe_bases: dict[str, Path], moe_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The layout `per_expert` has the names of the checkpoint, and the same A in the pairs of gate and up."""
    base = moe_bases[kind]
    convert_adapter(moe_adapters[kind], base, "per_expert", tmp_path / "each")
    convert_adapter(tmp_path / "each", base, "peft", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (moe_adapters[kind] / FILE).read_bytes()
    each, names = load_file(tmp_path / "each" / FILE), set(BaseCheckpoint.open(base).entries)
    modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in each}
    assert {f"{module}.weight" for module in modules} <= names
    gate, up = ("w1", "w3") if kind in ("mixtral", "minimax_m2") else ("gate_proj", "up_proj")
    shared = [key for key in each if f".experts.3.{gate}.lora_A" in key]
    assert shared
    assert all(torch.equal(each[key], each[key.replace(gate, up)]) for key in shared)
    torch.testing.assert_close(logits(ours_with(base, tmp_path / "each")), logits(ours_with(base, moe_adapters[kind])))


def with_own_gate_inputs(folder: Path, scale: float = 0.5) -> dict[str, Tensor]:
    """Change a `per_expert` file to one that transformers 4 could have trained: gate and up have different A's."""
    state = load_file(folder / FILE)
    for key in state:
        if ".experts." in key and (".gate_proj.lora_A" in key or ".w1.lora_A" in key):
            state[key] = state[key] * scale
    save_file(state, folder / FILE)  # without lola_ft's metadata, like a file of another tool
    return state


@every_kind
@pytest.mark.parametrize("settings", [{}, {"rslora": True}], ids=str)
def test_gate_and_up_with_an_input_matrix_of_each_become_one_pair_of_twice_the_rank(
    kind: str, settings: dict[str, Any], moe_bases: dict[str, Path], tmp_path: Path
) -> None:
    base = moe_bases[kind]
    each = random_adapter(base, kind, tmp_path / "each", "per_expert", **settings)
    with_own_gate_inputs(each)
    with pytest.warns(UserWarning, match="their ranks are added"):
        convert_adapter(each, base, "peft", tmp_path / "peft")
    architecture = BaseCheckpoint.open(base).architecture
    separate, joined = (read_adapter(tmp_path / name).weights(architecture) for name in ("each", "peft"))
    assert separate.pairs.keys() == joined.pairs.keys()
    for module in separate.pairs:
        torch.testing.assert_close(joined.delta(module), separate.delta(module), atol=1e-7, rtol=1e-6)
    with pytest.warns(UserWarning, match="their ranks are added"):
        ours = ours_with(base, each)
    torch.testing.assert_close(logits(ours), logits(stock_peft(base, tmp_path / "peft")), atol=1e-5, rtol=1e-4)


def test_gate_and_up_of_different_strength_are_refused_by_name(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    each = random_adapter(moe_bases["olmoe"], "olmoe", tmp_path / "each", "per_expert")
    config = json.loads((each / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"experts\.\d+\.gate_proj": 3}
    (each / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"experts\.0\.gate_proj and up_proj: their ranks or scalings differ"):
        convert_adapter(each, moe_bases["olmoe"], "peft", tmp_path / "peft")


@every_kind
def test_only_the_wanted_weights_are_trained_and_all_others_stay_bit_equal(
    kind: str, moe_bases: dict[str, Path]
) -> None:
    """One step on a 4-bit base with dropout, a selection of experts and a frozen router."""
    model = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    layers = sum(name.endswith(".experts") for name, _ in model.named_modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = AdapterSettings(attention_rank=4, expert_rank=4, dropout=0.1, selection=((1, 3),) * layers)
    adapted = add_adapter(model, settings).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(input_ids=IDS, labels=IDS, skip_logits=True, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    moved = [name for name, p in adapted.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert any(".experts.base_layer.lora_B" in name for name in moved)
    assert any(".experts.lora_B" in name for name in moved)
    assert any("o_proj" in name for name in moved)


REFUSED = {
    "mlp": ({"mlp_rank": 4}, "adapter.mlp"),
    "shared_experts": ({"shared_rank": 4}, "adapter.shared_experts"),
}


@every_kind
@pytest.mark.parametrize("group", REFUSED)
def test_a_group_that_the_base_lacks_is_refused_with_those_that_it_has(
    kind: str, group: str, moe_bases: dict[str, Path]
) -> None:
    architecture = BaseCheckpoint.open(moe_bases[kind]).architecture
    settings, key = REFUSED[group]
    if group in KINDS[kind].groups:
        assert lora_config(AdapterSettings(**settings), architecture).target_modules
        return
    with pytest.raises(UserError, match=rf"{key}: .*no {group}. It has attention, .*experts, router, norms"):
        lora_config(AdapterSettings(**settings), architecture)


@every_kind
def test_loftq_starts_at_the_rounding_error_of_gate_and_up_together(kind: str, moe_bases: dict[str, Path]) -> None:
    checkpoint = BaseCheckpoint.open(moe_bases[kind])
    model = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    adapted = add_adapter(model, AdapterSettings(expert_rank=16, attention_rank=16, init="loftq"))
    said = start_at_rounding_error(adapted, checkpoint)
    assert 0.2 < float(said.rpartition("corrects ")[2].partition("%")[0]) / 100 < 1, said
    plain = load_base(moe_bases[kind], None, "float32", "cpu", quiet=True)
    rounded = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    before, after = ((logits(other) - logits(plain)).square().mean() for other in (rounded, adapted.eval()))
    assert after < before
