"""Proof that a merged checkpoint computes what base plus adapter does, by loading both from disk."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_ft.adapters import load_adapter
from lola_ft.errors import AdapterError
from lola_ft.model.hub_checkpoint import HubCheckpoint
from lola_ft.quantization import load_base

# Ordinary sentences of several scripts, so that many experts are visited.
PROMPTS = (
    "The river was high after three days of rain, and the bridge was closed.",
    "Jina langu ni Amina na ninaishi Mombasa karibu na bahari.",
    "Die Katze schläft auf dem warmen Stein vor dem Haus.",
    "मेरे गाँव में एक पुराना बरगद का पेड़ है।",
    "يشرب جدي الشاي كل صباح في الحديقة.",
    "今日は駅前の店で新しい本を買いました。",
)
# Largest logit difference allowed, as a share of the largest logit. Rounding every merged weight to 16 bits moves
# logits by a per cent or two; float32 leaves only the order of summation.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_FLOAT32_LIMIT_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Verification:
    """Comparison of merged and base-plus-adapter on `tokens` tokens of the prompts.

    Attributes:
        max_logit_difference: Largest absolute difference over all positions and vocabulary entries.
        largest_logit: For scale.
        top1_agreement: Share of positions whose most likely next token is the same.
        dtype: What both were computed in.
    """

    max_logit_difference: float
    largest_logit: float
    top1_agreement: float
    tokens: int
    dtype: str


def verify(base: Path, adapter: Path, merged: Path, rounding: str) -> Verification:
    """Reload both, one after the other, and compare logits.

    Raises:
        AdapterError: If they differ by more than rounding explains.
    """
    checkpoint = HubCheckpoint.open(merged)
    weights_dtype = checkpoint.entries["transformer.h.0.attn.c_attn.weight"].dtype
    numel = sum(entry.num_bytes // entry.dtype.itemsize for entry in checkpoint.entries.values())
    compute = torch.float32 if 4 * numel <= _FLOAT32_LIMIT_BYTES else weights_dtype
    prompts = _prompt_ids(merged, checkpoint.config.vocab_size)

    quantization = "nf4" if rounding == "nf4" else None
    reference_model = load_base(base, quantization=quantization, dtype=compute, quiet=True)
    reference = _logits(load_adapter(reference_model, adapter, allow_other_base=True), prompts)
    del reference_model
    gc.collect()
    result = _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=compute).to(reference[0].device), prompts)

    difference = max((a - b).abs().max().item() for a, b in zip(reference, result, strict=True))
    largest = max(a.abs().max().item() for a in reference)
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, result, strict=True)])
    if not difference <= _TOLERANCE[weights_dtype] * largest:
        raise AdapterError(
            f"The merged model's logits differ from base plus adapter by {difference:.3g} (largest logit "
            f"{largest:.3g}), more than {weights_dtype} rounding explains. Nothing was written."
        )
    return Verification(difference, largest, agree.float().mean().item(), agree.numel(), str(compute).split(".")[1])


def _prompt_ids(folder: Path, vocab_size: int) -> list[Tensor]:
    """The prompts' token ids; without a tokenizer, ids spread over the vocabulary."""
    if any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    else:
        ids = [[(17 * row + 7919 * i) % vocab_size for i in range(16)] for row in range(len(PROMPTS))]
    return [torch.tensor([row[:64]]) for row in ids]


@torch.no_grad()
def _logits(model: nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    model.eval()
    device = next(model.parameters()).device
    return [model(ids.to(device)).logits[0].float() for ids in prompts]
