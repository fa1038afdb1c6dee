"""Heads for downstream tasks on a 4-bit backbone."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import lola_ft
from lola_ft.adapters import attach
from lola_ft.errors import UserError
from lola_ft.quantization import NF4Experts
from tests.grids import slow_but

HEADS = (("sequence_classification", "SEQ_CLS"), ("token_classification", "TOKEN_CLS"))
GRID = [(*head, quantization) for head in HEADS for quantization in ("nf4", None)]


@pytest.mark.parametrize(("head", "task", "quantization"), slow_but([(*HEADS[0], "nf4"), (*HEADS[1], None)], GRID))
def test_a_head_trains_with_lora_on_the_experts(
    head: str, task: str, quantization: str | None, tiny_base: Path
) -> None:
    torch.manual_seed(0)
    base = lola_ft.load_base(tiny_base, quantization, "float32", quiet=True, head=head, num_labels=3)
    base.config.pad_token_id = 1
    config = LoraConfig(
        task_type=task,
        r=4,
        target_modules=["attn.c_attn"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
    )
    model = attach(base, config).train()
    ids = torch.randint(6, 300, (8, 12))
    labels = torch.arange(8) % 3 if head == "sequence_classification" else ids % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    experts = [module for module in model.modules() if isinstance(module, NF4Experts)]
    assert len(experts) == (2 if quantization else 0)


def test_the_backbone_is_the_causal_models(tiny_base: Path) -> None:
    ids = torch.randint(6, 300, (2, 9))
    causal = lola_ft.load_base(tiny_base, "nf4", "float32", quiet=True)
    classifier = lola_ft.load_base(
        tiny_base, "nf4", "float32", quiet=True, head="sequence_classification", num_labels=5
    )
    with torch.no_grad():
        assert torch.equal(causal.transformer(ids).last_hidden_state, classifier.transformer(ids).last_hidden_state)
    assert classifier.score.weight.shape == (5, 64)
    assert torch.isfinite(classifier.score.weight).all()


def test_an_unknown_head_is_refused(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="causal_lm, sequence_classification, token_classification"):
        lola_ft.load_base(tiny_base, head="regression")
