"""The effects of rounding on a merge: loss and logits of the adapter on the 4-bit base, on the original, and merged."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.table import Table

from lola_ft.merging.outputs import Outputs


@dataclass(frozen=True)
class Distance:
    """The distance of one model's predictions from another's.

    Attributes:
        kl: Mean Kullback-Leibler divergence of the second model's next-token distributions from the first's, in nats
            per token.
        top1_agreement: Share of positions with the same most likely next token.
        loss_difference: The first model's mean loss minus the second's, in nats per token.
    """

    kl: float
    top1_agreement: float
    loss_difference: float


@dataclass(frozen=True)
class Effects:
    """Losses (nats per token) and distances on the prompts.

    Values for the 4-bit base are None if training did not use a 4-bit base.

    Attributes:
        adapter_on_4_bit: Loss of the adapter on the 4-bit base, as in training.
        adapter_on_original: Loss of the adapter on the original weights.
        merged: Loss of the merged model, with the chosen rounding.
        original_from_4_bit: Distance of the adapter on the original weights from the adapter on the 4-bit base. Except
            for rounding to the output dtype, it is also the distance of `--rounding base` from `--rounding nf4`.
        merged_from_4_bit: Distance of the merged model from the adapter on the 4-bit base.
        merged_from_original: Distance of the merged model from the adapter on the original weights.
    """

    merged: float
    adapter_on_4_bit: float | None = None
    adapter_on_original: float | None = None
    original_from_4_bit: Distance | None = None
    merged_from_4_bit: Distance | None = None
    merged_from_original: Distance | None = None


def measure_effects(
    merged: list[Outputs], on_4_bit: list[Outputs] | None, on_original: list[Outputs] | None
) -> Effects:
    """Compare the three models' outputs on the same prompts. A model that was not run is left out."""
    return Effects(
        merged=_loss(merged),
        adapter_on_4_bit=_loss(on_4_bit) if on_4_bit else None,
        adapter_on_original=_loss(on_original) if on_original else None,
        original_from_4_bit=_distance(on_original, on_4_bit) if on_original and on_4_bit else None,
        merged_from_4_bit=_distance(merged, on_4_bit) if on_4_bit else None,
        merged_from_original=_distance(merged, on_original) if on_original else None,
    )


def effects_table(effects: Effects, rounding: str) -> Table:
    """Return a table to print, with one line per model. Divergence and agreement refer to lines (1) and (2)."""
    table = Table(title="What rounding does, on a few sentences", title_justify="left")
    for heading in ("", "loss", "KL (1)", "top-1 (1)", "KL (2)", "top-1 (2)"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    if effects.adapter_on_4_bit is not None:
        table.add_row("(1) adapter, 4-bit base", _number(effects.adapter_on_4_bit), "", "", "", "")
    if effects.adapter_on_original is not None:
        loss = _number(effects.adapter_on_original)
        table.add_row("(2) adapter, original", loss, *_cells(effects.original_from_4_bit), "", "")
    cells = (*_cells(effects.merged_from_4_bit), *_cells(effects.merged_from_original))
    table.add_row(f"merged, rounding {rounding}", _number(effects.merged), *cells)
    return table


def advice(effects: Effects) -> str:
    """Say which rounding to choose; "" if there is no choice."""
    if effects.original_from_4_bit is None:
        return ""
    return (
        "Apart from the rounding of the output dtype, --rounding base gives the adapter on the original base, and "
        "--rounding nf4 gives the adapter on the 4-bit base of training. Choose nf4 to keep what you trained and "
        "evaluated in 4 bit, or base for the original weights (their loss minus the 4-bit loss: "
        f"{original_minus_4_bit(effects):+.4f} nats per token here)."
    )


def original_minus_4_bit(effects: Effects) -> float:
    """Return the loss on the original weights minus the loss on the 4-bit ones, in nats per token."""
    assert effects.original_from_4_bit is not None
    return effects.original_from_4_bit.loss_difference


def _loss(outputs: list[Outputs]) -> float:
    """Return the mean cross-entropy of the next tokens, in nats."""
    logits = torch.cat([out.logits_SV[:-1] for out in outputs])
    return F.cross_entropy(logits, torch.cat([out.ids_S[1:] for out in outputs])).item()


def _distance(first: list[Outputs], second: list[Outputs]) -> Distance:
    a = torch.cat([out.logits_SV for out in first])
    b = torch.cat([out.logits_SV for out in second])
    # KL(second || first): `first` approximates `second`.
    kl = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True).item()
    agreement = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    return Distance(max(kl, 0.0), agreement, _loss(first) - _loss(second))


def _cells(distance: Distance | None) -> tuple[str, str]:
    return (f"{distance.kl:.2g}", f"{distance.top1_agreement:.1%}") if distance else ("", "")


def _number(loss: float) -> str:
    return f"{loss:.4f}"
