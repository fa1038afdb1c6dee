"""Mixtures of experts loaded dense and in 4 bit, with their loss. The reference is stock transformers."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import CheckpointError
from lola_ft.families import architecture_of
from lola_ft.model.choices import seen_choices
from lola_ft.model.experts import FusedExperts
from lola_ft.quantization import NF4Experts, NF4Linear, audit, load_base, quantize_base
from lola_ft.quantization.audit import require_quantized
from tests.families.moe import KINDS, make_moe

IDS = torch.randint(6, 320, (2, 13), generator=torch.Generator().manual_seed(1))
LABELS = torch.cat([torch.full((2, 4), -100), IDS[:, 4:]], dim=1)
MASK = torch.cat([torch.ones(2, 10), torch.tensor([[1.0] * 3, [0.0] * 3])], dim=1).long()

every_kind = pytest.mark.parametrize("kind", KINDS)


def stock_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def dense_twin(model: Any, base: Path) -> Any:
    """Return stock transformers' model with the dequantised weights of a 4-bit model."""
    twin = stock_model(base)
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            twin.get_submodule(name).weight.data = module.dense_weight(torch.float32)
        elif isinstance(module, NF4Experts):
            for projection in module.shapes:
                stack = module.weights(projection).dense(torch.float32)
                twin.get_submodule(name).get_parameter(projection).data = stack
    return twin


@every_kind
def test_dense_logits_loss_and_gradients_are_those_of_stock_transformers(kind: str, moe_bases: dict[str, Path]) -> None:
    stock, ours = stock_model(moe_bases[kind]), load_base(moe_bases[kind], None, "float32", "cpu", quiet=True)
    assert any(isinstance(module, FusedExperts) for module in ours.modules())
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)
    expected = stock(IDS, labels=LABELS).loss
    outputs = ours(input_ids=IDS, labels=LABELS, skip_logits=True, use_cache=False)
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.logits is None
    halved = ours(input_ids=IDS, labels=LABELS, skip_logits=True, num_items_in_batch=36)
    torch.testing.assert_close(halved.loss, expected / 2)
    expected.backward()
    outputs.loss.backward()
    wanted = {name: parameter.grad for name, parameter in stock.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert {name for name, grad in wanted.items() if grad is not None} == found.keys()
    for name in found:
        grad = wanted[name]
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)  # another order of sums


@every_kind
def test_the_balancing_loss_is_that_of_the_authors_over_real_tokens(kind: str, moe_bases: dict[str, Path]) -> None:
    stock, ours = stock_model(moe_bases[kind]), load_base(moe_bases[kind], None, "float32", "cpu", quiet=True)
    layers = len(architecture_of(ours.config).sizes.moe_layers)
    for mask in (None, MASK):
        if architecture_of(ours.config).family.routing.balance is None:
            assert ours(IDS, labels=LABELS, skip_logits=True, output_router_logits=True).aux_loss is None
            continue
        expected = stock(IDS, attention_mask=mask, output_router_logits=True).aux_loss
        outputs = ours(IDS, attention_mask=mask, labels=LABELS, skip_logits=True, output_router_logits=True)
        torch.testing.assert_close(outputs.aux_loss, expected)
        assert [tuple(logits.shape) for logits in outputs.router_logits] == [
            (26, ours.config.num_local_experts if kind == "mixtral" else 8)
        ] * layers


@every_kind
def test_every_matrix_in_4_bit_is_what_bitsandbytes_makes_of_the_tensor_in_the_file(
    kind: str, moe_bases: dict[str, Path]
) -> None:
    model = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    places = architecture_of(model.config).places
    tensors = {entry.name: entry.read() for entry in BaseCheckpoint.open(moe_bases[kind])}
    assert tensors.keys() == places.keys()
    quantised = 0
    for name, tensor in tensors.items():
        place = places[name]
        module = model.get_submodule(place.module)
        if not place.quantized:
            assert torch.equal(getattr(module, place.leaf), tensor), name
            continue
        if isinstance(module, NF4Experts):
            stored = module.stored(place.part or place.leaf, place.expert or 0)
            dense = module.expert_weight(place.part or place.leaf, place.expert or 0, torch.float32)
        else:
            assert isinstance(module, NF4Linear), name
            stored, dense = module.stored(), module.dense_weight(torch.float32)
        packed, state = bnb.quantize_4bit(tensor.reshape(-1), quant_type="nf4", compress_statistics=True)
        assert torch.equal(stored.packed, packed.view(-1)), name
        assert torch.equal(stored.absmax, state.absmax), name
        assert torch.equal(stored.offset, state.offset), name
        assert torch.equal(dense.flatten(), bnb.dequantize_4bit(packed, state).flatten()), name
        quantised += 1
    assert quantised == sum(place.quantized for place in places.values()) > 20


@every_kind
def test_4_bit_logits_are_those_of_stock_transformers_with_the_rounded_weights(
    kind: str, moe_bases: dict[str, Path]
) -> None:
    ours = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    twin = dense_twin(ours, moe_bases[kind])
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-4)  # another order of sums


@every_kind
def test_nothing_dense_is_kept_for_backward(kind: str, moe_bases: dict[str, Path]) -> None:
    model = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    embeds = model.get_input_embeddings()(IDS).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach().clone())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=embeds, labels=LABELS, skip_logits=True, use_cache=False).loss.backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0
    dense = [module.dense_weight(torch.float32) for module in model.modules() if isinstance(module, NF4Linear)]
    for module in (module for module in model.modules() if isinstance(module, NF4Experts)):
        stacks = [module.weights(name).dense(torch.float32) for name in module.shapes]
        dense += [*stacks, *(expert for stack in stacks for expert in stack)]
    sizes = defaultdict(list)
    for weight in dense:
        sizes[weight.numel()].append(weight.flatten().sort().values)
    for tensor in kept:
        numbers = tensor.float().flatten().sort().values  # in any orientation
        assert not any(torch.equal(numbers, weight) for weight in sizes[tensor.numel()])


@every_kind
def test_the_audit_counts_every_weight_and_refuses_a_dense_expert(kind: str, moe_bases: dict[str, Path]) -> None:
    model = load_base(moe_bases[kind], "nf4", "bfloat16", "cpu", quiet=True)
    counted = audit(model).as_dict()
    numbers = sum(tensor.numel() for tensor in load_file(moe_bases[kind] / "model.safetensors").values())
    assert sum(count["parameters"] for count in counted.values()) == numbers
    assert {name.rpartition(" ")[2] for name in counted if "experts" in name} == {"nf4"}
    name, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, NF4Experts))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, FusedExperts(**experts.settings).to(torch.bfloat16))
    with pytest.raises(CheckpointError, match=rf"still dense after 4-bit loading: {name}.gate_up_proj"):
        require_quantized(model)


@every_kind
def test_a_quantised_base_is_cached_and_read_bit_by_bit(kind: str, moe_bases: dict[str, Path]) -> None:
    fresh = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    kept = load_base(quantize_base(moe_bases[kind], "float32", quiet=True), "nf4", "float32", "cpu", quiet=True)
    states = fresh.state_dict(), kept.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, kept(IDS).logits)


@every_kind
def test_a_tied_head_stays_tied(kind: str, moe_bases: dict[str, Path], tmp_path: Path) -> None:
    own = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    assert own.lm_head.weight is not own.get_input_embeddings().weight
    tied = load_base(make_moe(tmp_path, kind, tie_word_embeddings=True), "nf4", "float32", "cpu", quiet=True)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    with torch.no_grad():
        assert tied(IDS).logits.isfinite().all()


@every_kind
def test_packed_documents_do_not_see_each_other(kind: str, moe_bases: dict[str, Path]) -> None:
    model = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True)
    first, second = IDS[:1], IDS[1:, :9]
    packed, positions = torch.cat([first, second], 1), torch.tensor([[*range(13), *range(9)]])
    with torch.no_grad():
        together = model.model(packed, position_ids=positions, use_cache=False).last_hidden_state[:, 13:]
        alone = model.model(second, use_cache=False).last_hidden_state
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@every_kind
def test_a_layer_that_is_computed_again_keeps_its_choices(kind: str, moe_bases: dict[str, Path]) -> None:
    """The routers change between a layer's two passes, by more than rounding, and tokens keep their experts."""
    model = load_base(moe_bases[kind], "nf4", "float32", "cpu", quiet=True).train()
    model.gradient_checkpointing_enable()
    embeds = model.get_input_embeddings()(IDS).requires_grad_()
    with seen_choices(model) as seen:
        loss = model(inputs_embeds=embeds, labels=LABELS, skip_logits=True, use_cache=False).loss
        forward = [choices.expert_ids_TK for choices in seen]
        seen.clear()
        routers = [module for name, module in model.named_modules() if name.endswith(("mlp.gate", "moe.router"))]
        for router in (getattr(module, "wg", module) for module in routers):
            router.weight.data = torch.flipud(router.weight.data)
        loss.backward()
    assert len(forward) == len(seen) == len([m for m in routers if not isinstance(m, nn.Linear)])
    for before, again in zip(reversed(forward), seen, strict=True):
        assert torch.equal(before, again.expert_ids_TK)


@every_kind
def test_a_trained_router_scores_in_float32_on_a_16_bit_base(kind: str, moe_bases: dict[str, Path]) -> None:
    """Fully trained or with LoRA, with or without autocast. The other modules keep their dtype."""
    for settings in (AdapterSettings(tune_router=True), AdapterSettings(router_rank=4)):
        model = add_adapter(load_base(moe_bases[kind], "nf4", "bfloat16", "cpu", quiet=True), settings).train()
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(
                    input_ids=IDS, labels=LABELS, skip_logits=True, use_cache=False, output_router_logits=True
                )
            assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
            outputs.loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained
        assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in trained)


@every_kind
def test_a_quantised_checkpoint_is_refused_with_the_fix(kind: str, moe_bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(moe_bases[kind], tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"config.json: this checkpoint is quantised \(gptq\).*Give the original"):
        load_base(tmp_path / "base", "nf4", "float32", "cpu", quiet=True)


def test_queries_that_the_model_clips_in_place_are_trained_in_4_bit_too(tmp_path: Path) -> None:
    base = make_moe(tmp_path, "olmoe", clip_qkv=0.5)
    model = load_base(base, "nf4", "float32", "cpu", quiet=True)
    grads = []
    for one in (model, dense_twin(model, base)):
        embeds = one.get_input_embeddings()(IDS).detach().requires_grad_()
        one(inputs_embeds=embeds, labels=LABELS, use_cache=False).loss.backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-3)


@every_kind
def test_a_dense_model_is_saved_in_the_layout_of_its_checkpoint(
    kind: str, moe_bases: dict[str, Path], tmp_path: Path
) -> None:
    load_base(moe_bases[kind], None, "float32", "cpu", quiet=True).save_pretrained(tmp_path)
    saved, given = (load_file(folder / "model.safetensors") for folder in (tmp_path, moe_bases[kind]))
    assert saved.keys() == given.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in given.items())
