"""Attention of transformers' models: packed documents a stretch at a time, and a CPU's backward in bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lola_ft.adapters import AdapterSettings, add_adapter
from lola_ft.families import architecture_of, attention
from lola_ft.families.attention import IMPLEMENTATION, stretches_for
from lola_ft.kernels.attention import cpu_attention
from lola_ft.model import packed
from lola_ft.quantization import load_base
from tests.families.moe import KINDS

LENGTHS = (7, 5, 20, 1, 9)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
IDS = torch.randint(6, 300, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
every_kind = pytest.mark.parametrize("kind", KINDS)
STRETCHES = [(0, 12), (12, 32), (32, 42)]  # 7 + 5 tokens, 20 alone because it is longer than 12, 1 + 9
WIDTHS = {stop - start for start, stop in STRETCHES}
WHOLE = {sum(LENGTHS)}


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed.TOKENS, "cpu", 12)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of PyTorch's attention."""
    seen: list[int] = []
    attend = attention.sdpa_attention_forward

    def counting(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counting)
    return seen


def gradients(base: Path, implementation: str, checkpointing: bool = False) -> dict[str, Tensor]:
    """Return the loss and the gradients of an adapter on all attention layers."""
    torch.manual_seed(1)
    model = add_adapter(load_base(base, None, "float32", "cpu", quiet=True), AdapterSettings(attention_rank=4)).train()
    model.get_base_model().config._attn_implementation = implementation
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    loss = model(input_ids=IDS, labels=IDS, position_ids=POSITIONS, use_cache=False, skip_logits=True).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) >= 8
    return found | {"loss": loss.detach()}


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_stretches_give_the_loss_and_the_gradients_of_the_whole_row(
    kind: str, checkpointing: bool, moe_bases: dict[str, Path], widths: list[int]
) -> None:
    ours = gradients(moe_bases[kind], IMPLEMENTATION, checkpointing)
    slides = KINDS[kind].sizes.get("sliding_window", 42) < 20
    assert {*widths} == (WHOLE if slides else WIDTHS)
    torch.testing.assert_close(ours, gradients(moe_bases[kind], "sdpa"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen2", "Qwen3"])
def test_stretches_give_the_same_in_dense_models(name: str, tmp_path: Path, widths: list[int]) -> None:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "GPT2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=320, initializer_range=0.1, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ours = gradients(tmp_path, IMPLEMENTATION)
    assert {*widths} == WIDTHS
    torch.testing.assert_close(ours, gradients(tmp_path, "sdpa"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("window", "by_stretch"), [(None, True), (20, True), (19, False), (4, False)])
def test_a_window_shorter_than_a_stretch_leaves_the_row_whole(
    window: int | None, by_stretch: bool, tmp_path: Path, widths: list[int]
) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=320, num_key_value_heads=2, sliding_window=window, initializer_range=0.1, **sizes
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    ours = gradients(tmp_path, IMPLEMENTATION)
    assert {*widths} == (WIDTHS if by_stretch else WHOLE)
    torch.testing.assert_close(ours, gradients(tmp_path, "sdpa"), atol=1e-5, rtol=1e-4)


def test_only_packed_rows_of_a_model_with_pytorchs_attention_are_cut(moe_bases: dict[str, Path]) -> None:
    model = load_base(next(iter(moe_bases.values())), None, "float32", "cpu", quiet=True)
    found = stretches_for(model.config, POSITIONS)
    assert found is not None
    assert [(start, stop) for start, stop, _ in found] == STRETCHES
    assert stretches_for(model.config, torch.arange(42)[None]) is None, "one document"
    assert stretches_for(model.config, torch.arange(6).expand(7, 6)) is None, "several rows"
    model.set_attn_implementation("eager")
    assert stretches_for(model.config, POSITIONS) is None, "another way to attend was asked for"


def test_a_saved_model_names_no_way_to_attend(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    """Others have no function of this name."""
    model = load_base(next(iter(moe_bases.values())), None, "float32", "cpu", quiet=True)
    assert model.config._attn_implementation == IMPLEMENTATION
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_without_stretches_it_is_pytorchs_attention(moe_bases: dict[str, Path]) -> None:
    base = next(iter(moe_bases.values()))
    outs: list[Tensor] = []
    for implementation in (IMPLEMENTATION, "sdpa"):
        model = load_base(base, None, "float32", "cpu", quiet=True)
        model.config._attn_implementation = implementation
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        outs.append(model(IDS, attention_mask=mask, use_cache=False).logits)
    assert torch.equal(*outs)


@every_kind
@pytest.mark.parametrize("rows", ["full", "padded", "packed"])
def test_in_bfloat16_on_a_cpu_the_backward_is_ours_and_right(
    kind: str, rows: str, moe_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, int]] = []

    def counting(query: Tensor, key: Tensor, *args: Any) -> Tensor:
        used.append((query.shape[1], key.shape[1]))
        return cpu_attention(query, key, *args)

    monkeypatch.setattr(attention, "cpu_attention", counting)
    exact = _of_rows(moe_bases[kind], rows, "sdpa", bfloat16=False)
    assert not used
    ours, theirs = (_of_rows(moe_bases[kind], rows, name, bfloat16=True) for name in (IMPLEMENTATION, "sdpa"))
    config = transformers.AutoConfig.from_pretrained(moe_bases[kind])
    if architecture_of(config).family.attention == "latent":  # queries and values have other sizes
        assert not used
    else:
        assert used
        assert all(heads == key_heads for heads, key_heads in used)
    error = float((ours - exact).norm() / exact.norm())
    assert error < 1.5 * float((theirs - exact).norm() / exact.norm()) + 1e-3


def _of_rows(base: Path, rows: str, implementation: str, bfloat16: bool) -> Tensor:
    """Return the gradients of all weights of attention layers, one after another."""
    model = load_base(base, None, "float32", "cpu", quiet=True)
    model.config._attn_implementation = implementation
    inputs = {"input_ids": IDS, "labels": IDS, "position_ids": POSITIONS}
    if rows != "packed":
        inputs = {"input_ids": IDS.view(2, -1), "labels": IDS.view(2, -1)}
    if rows == "padded":
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[1, 15:] = 0
        inputs |= {"attention_mask": mask, "labels": inputs["labels"].where(mask.bool(), -100)}
    model.requires_grad_(False)
    trained = [p.requires_grad_() for name, p in model.named_parameters() if "self_attn" in name and p.ndim == 2]
    assert trained
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = model(**inputs, use_cache=False, skip_logits=True).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
