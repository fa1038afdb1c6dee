"""Every form of a checkpoint loads as the native class with the same numbers, without remote code."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from lola_ft.errors import UserError
from lola_ft.model import LolaConfig, LolaForCausalLM, LolaModel

AUTO_MAP = {
    "AutoConfig": "configuration_lola_gpt2.LOLAConfig",
    "AutoModel": "modeling_lola_gpt2.LOLAModel",
    "AutoModelForCausalLM": "modeling_lola_gpt2.LOLALMHeadModel",
}


def with_auto_map(folder: Any) -> None:
    """Name code files that do not exist, so that opening them would fail."""
    folder.set_config(auto_map=AUTO_MAP)


def with_old_config(folder: Any) -> None:
    """Write the config of the first versions, with other special ids, another activation name, and keys of GPT-2."""
    folder.set_config(
        activation_function="gelu_fast",
        bos_token_id=100095,
        eos_token_id=100095,
        n_ctx=64,
        summary_type="cls_index",
        torch_dtype="float32",
        transformers_version="4.28.0",
    )


def with_legacy_tensors(folder: Any) -> None:
    """Add the causal-mask buffers of old GPT-2 code, and a copy of the input embeddings as output embeddings."""
    tensors = folder.tensors
    for n in range(4):
        tensors[f"transformer.h.{n}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"transformer.h.{n}.attn.masked_bias"] = torch.tensor(-10000.0)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    folder.set_tensors(tensors)


def with_shards(folder: Any) -> None:
    folder.shard(5)


def with_everything(folder: Any) -> None:
    with_auto_map(folder)
    with_old_config(folder)
    with_legacy_tensors(folder)
    with_shards(folder)


FORMS = [with_auto_map, with_old_config, with_legacy_tensors, with_shards, with_everything]


def logits_of(model: LolaForCausalLM, golden: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(golden["input_ids"], attention_mask=golden["attention_mask"]).logits


@pytest.mark.parametrize("change", FORMS, ids=lambda change: change.__name__)
def test_every_form_gives_the_plain_ones_logits(
    change: Any, folder: Any, golden_model: LolaForCausalLM, golden: dict[str, Tensor]
) -> None:
    change(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder.path, output_loading_info=True)
    assert type(model) is LolaForCausalLM
    assert not any(info.values()), info
    assert torch.equal(logits_of(model, golden), logits_of(golden_model, golden))
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("trust", [None, False, True])
def test_remote_code_is_never_asked_for(trust: bool | None, folder: Any) -> None:
    """This holds with trust_remote_code, too, which users copy from the model card."""
    with_auto_map(folder)
    given = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(folder.path, **given)) is LolaConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder.path, **given)) is LolaForCausalLM


def test_the_backbone_loads_without_the_head(
    folder: Any, golden_model: LolaForCausalLM, golden: dict[str, Tensor]
) -> None:
    backbone = AutoModel.from_pretrained(folder.path).eval()
    assert type(backbone) is LolaModel
    with torch.no_grad():
        hidden = backbone(golden["input_ids"]).last_hidden_state
        expected = golden_model.transformer(golden["input_ids"]).last_hidden_state
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_every_stored_dtype_loads_in_every_wanted_dtype(
    stored: torch.dtype, wanted: torch.dtype, folder: Any, golden_model: LolaForCausalLM
) -> None:
    folder.cast(stored)
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=wanted)
    before = golden_model.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, before[name].to(stored).to(wanted)), name


def test_a_half_precision_checkpoint_is_saved_as_it_was(folder: Any) -> None:
    folder.cast(torch.bfloat16)
    before = folder.tensors
    AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto").save_pretrained(folder.path)
    after = folder.tensors
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_transformers_own_quantisers_are_refused(golden_base: Any) -> None:
    """They do not support fused experts: those would stay dense, silently."""
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(UserError, match=r"Load in 4 bit with lola_ft\.load_base"):
        AutoModelForCausalLM.from_pretrained(golden_base, quantization_config=config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype, golden_base: Any, golden: dict[str, Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_base, dtype=dtype).eval()
    with torch.no_grad():
        output = model(golden["input_ids"], attention_mask=golden["attention_mask"], output_router_logits=True)
    # The router scores in float32, so that close scores do not tie in 8 bits of mantissa.
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    same = torch.stack(output.router_logits).argmax(-1) == golden["base.router_logits"].argmax(-1)
    same_BS = same.all(0).view_as(golden["input_ids"])
    assert same_BS.float().mean() > 0.9
    # 4 layers of bfloat16 weights and activations with 8 bits of mantissa, on logits of standard deviation 0.6.
    limit = 0.1 if dtype == torch.bfloat16 else 0.02
    # A token attends to earlier tokens, so rows are compared up to their first different choice.
    untouched_BS = same_BS.cummin(dim=1).values
    difference = (output.logits.float() - golden["base.logits"]).abs().amax(-1)[untouched_BS]
    assert difference.max() < limit
