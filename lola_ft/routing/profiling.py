"""Profiling: each text passes once through the backbone, and the router's choices are counted inside each MoE layer.

Shapes: T real tokens of a batch, P of them sampled, K choices per token, C = T*K, L languages, M MoE layers,
E experts.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from lola_ft.console import progress_bar
from lola_ft.data import check_template, load_template
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.model.choices import Choices, seen_choices
from lola_ft.open_model import OpenModel, open_model
from lola_ft.routing.profile import About, Profile
from lola_ft.routing.texts import Piece, Texts, sources_of

SAMPLED = 1000
_BATCH_TOKENS = 8192  # tokens per forward pass, including padding
_WINDOW_TOKENS = 1 << 18  # tokens that are sorted by length at a time


def profile_routing(
    model: str | Path,
    data: Sequence[str | Path],
    base: str | None = None,
    revision: str | None = None,
    quantization: str | None = "auto",
    format: str = "text",
    language_column: str | None = None,
    unit: str | None = None,
    template: str | None = None,
    max_tokens_per_language: int | None = None,
    max_length: int | None = None,
    sample: int = SAMPLED,
    device: str | None = None,
) -> Profile:
    """Profile a base, a run, an adapter or a merged model on files in many languages.

    Args:
        data: Files, folders or globs. The language is in the file's name or in `language_column`.
        format: As in a recipe. Prompts are rendered by `template`, else by the model's own, else by Alpaca's.
        max_length: Most tokens of a piece of text; None means the model's positions.
        sample: Tokens per language whose own choices are kept, so that two profiles can be compared token by token.

    Raises:
        UserError: A model, a file or a row cannot be used.
    """
    if template is not None and format == "text":
        raise UserError("--template does nothing for format text, which has no prompt. Leave it out.")
    if template is not None:
        check_template(template)
    sources = sources_of(data, format, language_column, unit)
    opened = open_model(model, base, revision, quantization, device=device)
    opened.architecture.require({str(model): "experts"})
    positions = opened.sizes.positions
    if max_length is not None and not 1 <= max_length <= positions:
        raise UserError(f"--max-length {max_length}: must be from 1 to {positions}, the model's positions.")
    rendered = (
        opened.template
        if template is None and opened.template
        else load_template(template or "alpaca", opened.tokenizer)
    )
    texts = Texts(sources, opened.tokenizer, max_length or positions, max_tokens_per_language, rendered)
    return profile_texts(opened.model, texts, about_model(opened, texts.max_length), sample)


def about_model(opened: OpenModel, max_length: int) -> About:
    """Return a profile's facts about its model; of a full path only the last folder, because profiles are shared."""
    sizes, name = opened.sizes, opened.subject.name
    return About(
        model=Path(name).name if Path(name).is_absolute() else name,
        kind=opened.subject.kind,
        base_fingerprint=opened.fingerprint,
        quantization=opened.quantization,
        layers=sizes.moe_layers,
        hidden_size=sizes.hidden,
        inner_size=sizes.expert_inner,
        vocab_size=sizes.vocab,
        max_length=max_length,
    )


@torch.inference_mode()
def profile_texts(model: Any, texts: Texts, about: About, sample: int = SAMPLED) -> Profile:
    """Profile a model in memory, with the adapter that is active on it."""
    backbone = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model.eval()
    architecture = architecture_of(model.config)
    shape = len(about.layers), architecture.num_experts, architecture.sizes.top_k
    tally = _Tally(*shape, sample, backbone.device)
    with progress_bar("Profiling", "tokens") as bar:
        task = bar.add_task("", total=0)
        for window in _windows(texts):
            bar.update(task, total=texts.estimated_tokens)
            tally.expect(window)
            for batch in _batches(window):
                ids_BS = _padded([piece.ids for piece, _ in batch])
                # Padding is on the right, where causal attention hides it from all real tokens, so no mask is needed.
                with seen_choices(backbone) as choices:
                    outputs = backbone(ids_BS.to(tally.device), use_cache=False, output_router_logits=True)
                tally.count(outputs.router_logits, choices, batch, ids_BS.shape[1])
                bar.advance(task, sum(len(piece.ids) for piece, _ in batch))
    if not tally.languages:
        raise UserError("the texts have no tokens. Give files with text.")
    return tally.profile(about, texts)


class _Tally:
    """The counts, which stay on the device and are read once, at the end."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int, sample: int, device: torch.device) -> None:
        self.device, self.sample = device, sample
        self.languages: dict[str, int] = {}
        self.token_ids: list[Counter[int]] = []
        self.sampled: list[int] = []
        self.digests: list[Any] = []
        shape = (0, num_layers, num_experts)
        self.counts_LME = torch.zeros(shape, dtype=torch.int64, device=device)
        self.probs_LME = torch.zeros(shape, dtype=torch.float64, device=device)
        self.gates_LME = torch.zeros(shape, dtype=torch.float64, device=device)
        kind = torch.uint8 if num_experts <= 256 else torch.int16
        self.choices_LSMK = torch.zeros((0, sample, num_layers, top_k), dtype=kind, device=device)

    def expect(self, window: list[tuple[Piece, int]]) -> None:
        """Make room for a window's new languages."""
        new = {piece.language: None for piece, _ in window if piece.language not in self.languages}
        for language in new:
            self.languages[language] = len(self.languages)
            self.token_ids.append(Counter())
            self.sampled.append(0)
            self.digests.append(hashlib.sha256())
        for name in ("counts_LME", "probs_LME", "gates_LME", "choices_LSMK"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(len(new), *old.shape[1:])]))
        for index, (piece, _) in enumerate(window):
            place = self.languages[piece.language]
            window[index] = (piece, self.sampled[place])
            self.token_ids[place].update(piece.ids)
            kept = np.array(piece.ids[: max(0, self.sample - self.sampled[place])], dtype=np.int64)
            if kept.size:
                self.digests[place].update(np.append(kept, -1).tobytes())
                self.sampled[place] += len(kept)

    def count(
        self, router_logits: Sequence[Tensor], choices: Sequence[Choices], batch: list[tuple[Piece, int]], width: int
    ) -> None:
        """Count one batch, without waiting for the device."""
        real, language, slot = self._places(batch, width)
        real_T, language_T = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in (real, language))
        sampled = np.flatnonzero(slot < self.sample)
        sampled_P = torch.from_numpy(sampled).to(self.device)
        slot_P = torch.from_numpy(slot[sampled]).to(self.device)
        num_layers, num_experts = self.counts_LME.shape[1:]
        for layer, (logits_TE, chosen) in enumerate(zip(router_logits, choices, strict=True)):
            expert_ids_TK, weights_TK = (tensor[real_T] for tensor in chosen)
            cell_C = ((language_T * num_layers + layer)[:, None] * num_experts + expert_ids_TK).flatten()
            self.counts_LME.view(-1).index_add_(0, cell_C, torch.ones_like(cell_C))
            self.gates_LME.view(-1).index_add_(0, cell_C, weights_TK.flatten().double())
            self.probs_LME[:, layer].index_add_(0, language_T, logits_TE[real_T].float().softmax(dim=-1).double())
            ids_PK = expert_ids_TK[sampled_P].to(self.choices_LSMK.dtype)
            self.choices_LSMK[language_T[sampled_P], slot_P, layer] = ids_PK

    def _places(self, batch: list[tuple[Piece, int]], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each real token's index in the padded batch, its language, and its index in the language's sample."""
        lengths = np.array([len(piece.ids) for piece, _ in batch])
        languages = np.array([self.languages[piece.language] for piece, _ in batch])
        within = np.concatenate([np.arange(length) for length in lengths])
        rows = np.repeat(np.arange(len(batch)), lengths)
        first = np.repeat(np.array([start for _, start in batch]), lengths)
        return rows * width + within, np.repeat(languages, lengths), first + within

    def profile(self, about: About, texts: Texts) -> Profile:
        """Return the counts as a profile, with languages in alphabetical order."""
        names = tuple(sorted(self.languages))
        order = [self.languages[name] for name in names]
        tokens_L = torch.tensor([texts.tokens[name] for name in names])
        per_token = tokens_L[:, None, None]
        sampled = [self.sampled[place] for place in order]
        choices = self.choices_LSMK.cpu()
        if choices.shape[-1] == 1:
            choices = choices.squeeze(-1)
        histograms = [sorted(self.token_ids[place].items()) for place in order]
        pairs = torch.tensor([pair for histogram in histograms for pair in histogram], dtype=torch.int32)
        return Profile(
            about=about,
            languages=names,
            counts_LME=self.counts_LME.cpu()[order],
            mean_probs_LME=(self.probs_LME.cpu()[order] / per_token).float(),
            mean_gates_LME=(self.gates_LME.cpu()[order] / per_token).float(),
            tokens_L=tokens_L,
            bytes_L=torch.tensor([texts.bytes[name] for name in names]),
            documents_L=torch.tensor([texts.documents[name] for name in names]),
            token_kinds_L=torch.tensor([len(histogram) for histogram in histograms]),
            token_ids=pairs[:, 0].clone(),
            token_counts=pairs[:, 1].clone(),
            choices_SM=torch.cat([choices[place, :kept] for place, kept in zip(order, sampled, strict=True)]),
            sampled_L=torch.tensor(sampled),
            sample_digests=tuple(self.digests[place].hexdigest()[:16] for place in order),
        )


def _windows(pieces: Iterable[Piece]) -> Iterator[list[tuple[Piece, int]]]:
    """Yield pieces in windows of about 260,000 tokens; each with a 0, later the start of its sample."""
    window: list[tuple[Piece, int]] = []
    tokens = 0
    for piece in pieces:
        window.append((piece, 0))
        tokens += len(piece.ids)
        if tokens >= _WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _batches(window: list[tuple[Piece, int]]) -> Iterator[list[tuple[Piece, int]]]:
    """Yield batches of pieces with similar lengths, the longest first, so that there is little padding."""
    batch: list[tuple[Piece, int]] = []
    for item in sorted(window, key=lambda item: -len(item[0].ids)):
        if batch and (len(batch) + 1) * len(batch[0][0].ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _padded(rows: list[list[int]]) -> Tensor:
    """Return token ids (B, S), with zeros after shorter rows."""
    width = len(rows[0])
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows])
