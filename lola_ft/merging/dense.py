"""Merging an adapter into a dense baseline, which fits in memory whole: PEFT's own merge, proved by logits."""

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lola_ft.adapters.files import read_adapter
from lola_ft.baseline.adapter import load_dense_adapter
from lola_ft.baseline.card import write_dense_card
from lola_ft.baseline.checkpoint import MERGED_SHARD, DenseCheckpoint
from lola_ft.baseline.families import Family
from lola_ft.baseline.load import load_dense
from lola_ft.errors import AdapterError, UserError
from lola_ft.file_names import MERGE_REPORT_FILE
from lola_ft.files import copy_files, replace_folder, write_text
from lola_ft.kernels.precision import DTYPES
from lola_ft.merging.outputs import PROMPTS
from lola_ft.merging.record import run_record
from lola_ft.merging.report import MergeReport
from lola_ft.merging.verify import TOLERANCE, Verification
from lola_ft.model.hub_checkpoint import TEMPLATE_FILE, TOKENIZER_FILES, resolve_folder


def merge_dense(
    family: Family,
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: str,
    rounding: str | None,
    revision: str | None,
    allow_other_base: bool,
    check: str,
) -> MergeReport:
    """Write base plus adapter as transformers writes such a model, with tokenizer and template.

    The update is added in float32 to the unquantised weights; the sum is rounded once.

    Raises:
        AdapterError: The adapter does not fit, changes nothing, or the written model computes something else.
        UserError: Rounding to NF4, which only LOLA's merge knows.
    """
    if rounding == "nf4":
        raise UserError(f"--rounding nf4 is for LOLA; the base is a dense model ({family.name}). Leave it out.")
    stored = read_adapter(adapter)
    source = load_dense(base, None, "float32", "cpu", revision, quiet=True)
    own = DTYPES.get(dtype) or _stored_dtype(base, revision)
    adapted = load_dense_adapter(source, adapter, allow_other_base)
    prompts = _prompts(stored.folder, resolve_folder(base, revision), source.config.vocab_size)
    expected = _logits(adapted, prompts) if check == "full" else []
    largest, changed = _merge(adapted)
    if largest == 0:
        raise AdapterError("The adapter changes nothing: its update is all zeros. Was it trained? Nothing was written.")
    with replace_folder(out) as folder:
        _write(source, own, folder)
        _companions(resolve_folder(base, revision), stored.folder, folder)
        tensors = len(source.state_dict())
        report = MergeReport(
            base_fingerprint=source.base_fingerprint,
            base_kind="checkpoint",
            adapter_layout="peft",
            dtype=dtype,
            rounding="base",
            adapter_tensors=len(stored.entries),
            applied=2 * changed,
            changed=changed,
            rounded=0,
            copied=tensors - changed,
            dropped=[],
            largest_change=largest,
            verification=_verify(folder, prompts, expected, own) if check == "full" else None,
            skipped="" if check == "full" else f"--check {check} (of a dense base nothing else is checked)",
        )
        write_text(folder / MERGE_REPORT_FILE, json.dumps(asdict(report), indent=2) + "\n")
        origin = "" if Path(base).exists() else str(base)
        write_dense_card(folder, run_record(stored.folder) or {}, family, origin, merged=True)
    del adapted, source
    gc.collect()
    return report


@torch.no_grad()
def _merge(model: PeftModel) -> tuple[float, int]:
    """Add every update to its weight in place, as PEFT does; returns the largest change and how many there were."""
    largest, changed = 0.0, 0
    for module in model.modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            largest = max(largest, module.get_delta_weight("default").abs().max().item())
            changed += 1
    model.merge_and_unload(safe_merge=True)
    return largest, changed


def _write(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """In transformers' own class, so that whoever loads it needs nothing of ours."""
    config = model.config
    for name in ("router_aux_loss_coef", "output_router_logits", "_name_or_path"):
        config.__dict__.pop(name, None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    state: dict[str, Tensor] = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.config.dtype = dtype
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, max_shard_size=MERGED_SHARD)


def _companions(base: Path, adapter: Path, folder: Path) -> None:
    copy_files(adapter if any(adapter.glob("tokenizer*")) else base, folder, TOKENIZER_FILES)
    copy_files(adapter, folder, (TEMPLATE_FILE,))


def _stored_dtype(base: str | Path, revision: str | None) -> torch.dtype:
    return DenseCheckpoint.open(base, revision).dtype


def _prompts(adapter: Path, base: Path, vocab_size: int) -> list[Tensor]:
    folder = adapter if any(adapter.glob("tokenizer*")) else base
    if not any(folder.glob("tokenizer*")):
        return [torch.arange(16)[None] * 7919 % vocab_size]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:64]]) for text in PROMPTS]


@torch.no_grad()
def _logits(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    return [model.eval()(input_ids=ids).logits[0].float() for ids in prompts]


def _verify(folder: Path, prompts: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> Verification:
    """Reload what was written and compare.

    Raises:
        AdapterError: If they differ by more than rounding explains.
    """
    actual = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts)
    a, b = torch.cat(expected), torch.cat(actual)
    difference, largest = (a - b).abs().max().item(), a.abs().max().item()
    if not difference <= TOLERANCE[dtype] * largest:  # false for NaN, too
        raise AdapterError(
            f"The merged model's logits differ from base plus adapter by {difference:.3g} (largest {largest:.3g}), "
            f"more than {dtype} rounding explains. Nothing was written."
        )
    same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    return Verification(difference, largest, same, len(a), len(a), "float32")
