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
        max_logit_difference: Largest absolute difference over the vocabulary at the `compared` positions.
        largest_logit: For scale.
        top1_agreement: Share of positions whose most likely next token is the same.
        compared: Tokens before the first of their prompt that rounding sent to another expert: from there on logits
            differ by more than rounding.
        dtype: What both were computed in.
    """

    max_logit_difference: float
    largest_logit: float
    top1_agreement: float
    tokens: int
    compared: int
    dtype: str


@dataclass(frozen=True)
class _Outputs:
    """Of one prompt: logits (S, V), and scores (S*L, E) of L routers, token by token."""

    logits_SV: Tensor
    scores_NE: Tensor


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
    reference = _run(load_adapter(reference_model, adapter, allow_other_base=True), prompts)
    del reference_model
    gc.collect()
    result = _run(
        AutoModelForCausalLM.from_pretrained(merged, dtype=compute).to(reference[0].logits_SV.device), prompts
    )

    logits, merged_logits, scores, merged_scores = _comparable(reference, result)
    for what, a, b in (("router scores", scores, merged_scores), ("logits", logits, merged_logits)):
        difference, largest = (a - b).abs().max().item(), a.abs().max().item()
        if not difference <= _TOLERANCE[weights_dtype] * largest:  # false for NaN, too
            raise AdapterError(
                f"The merged model's {what} differ from base plus adapter by {difference:.3g} (largest {largest:.3g}), "
                f"more than {weights_dtype} rounding explains. Nothing was written."
            )
    agree = torch.cat(
        [a.logits_SV.argmax(-1) == b.logits_SV.argmax(-1) for a, b in zip(reference, result, strict=True)]
    )
    top1, name = agree.float().mean().item(), str(compute).split(".")[1]
    return Verification(difference, largest, top1, agree.numel(), len(logits), name)


def _comparable(reference: list[_Outputs], result: list[_Outputs]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and router scores, of both, that rounding alone can have moved.

    A score near a tie may fall the other way after rounding; that token then goes through another expert, and what
    follows it sees it. Scores up to and with the first such choice, and logits before it, must still agree.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for a, b in zip(reference, result, strict=True):
        rerouted_N = (a.scores_NE.argmax(-1) != b.scores_NE.argmax(-1)).tolist()
        first = rerouted_N.index(True) if True in rerouted_N else len(rerouted_N)
        seq = first * len(a.logits_SV) // len(rerouted_N)
        parts.append((a.logits_SV[:seq], b.logits_SV[:seq], a.scores_NE[: first + 1], b.scores_NE[: first + 1]))
    logits, merged_logits, scores, merged_scores = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(logits) == 0:
        raise AdapterError(
            "The merged model sends the first token of every prompt to other experts than base plus adapter does. "
            "Nothing was written."
        )
    return logits, merged_logits, scores, merged_scores


def _prompt_ids(folder: Path, vocab_size: int) -> list[Tensor]:
    """The prompts' token ids; without a tokenizer, ids spread over the vocabulary."""
    if any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    else:
        ids = [[(17 * row + 7919 * i) % vocab_size for i in range(16)] for row in range(len(PROMPTS))]
    return [torch.tensor([row[:64]]) for row in ids]


@torch.no_grad()
def _run(model: nn.Module, prompts: list[Tensor]) -> list[_Outputs]:
    model.eval()
    device = next(model.parameters()).device
    outputs = [model(ids.to(device), output_router_logits=True) for ids in prompts]
    return [
        _Outputs(out.logits[0].float(), torch.stack(out.router_logits, dim=1).flatten(0, 1).float()) for out in outputs
    ]
