"""Pre-training of the nano base: a plain loop over packed rows, with the same numbers in every run on one machine.

Shapes: N rows, B rows per step, S tokens per row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import TextColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lola_ft.console import progress_bar
from lola_ft.families import architecture_of


@dataclass(frozen=True)
class PretrainSettings:
    """The settings of pre-training. The number of steps is fixed, so the machine's speed does not matter."""

    steps: int = 800
    rows_per_step: int = 4  # few rows, because a short run learns more from many small steps
    row_length: int = 256  # tokens
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    seed: int = 0


def pretrain(model: Any, rows_NS: Tensor, eos_token_id: int, settings: PretrainSettings) -> float:
    """Train a model in place on next-token prediction, with the family's load-balancing loss if it has one.

    Args:
        rows_NS: Packed token ids (N, S), int64. Every document ends with the end-of-text token.

    Returns:
        The mean loss of the last tenth of the steps, without the load-balancing loss.
    """
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine_with_warmup(step, settings))
    balances = architecture_of(model.config).family.balances
    model.train()
    losses = []
    with progress_bar("Pre-training", "steps", TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("", total=settings.steps, loss=math.nan)
        for rows_BS in _batches(rows_NS, settings):
            outputs = model(
                input_ids=rows_BS,
                position_ids=restarting_positions(rows_BS, eos_token_id),
                labels=rows_BS,
                output_router_logits=balances,
                use_cache=False,
                skip_logits=True,
            )
            balance = model.config.router_aux_loss_coef * outputs.aux_loss if balances else 0.0
            (outputs.loss + balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(outputs.loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, row_length: int) -> Tensor:
    """Join the documents, each followed by the end-of-text token, and cut them into rows (N, S)."""
    ids: list[int] = []
    for document_ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*document_ids, tokenizer.eos_token_id]
    num_rows = len(ids) // row_length
    return torch.tensor(ids[: num_rows * row_length]).view(num_rows, row_length)


def restarting_positions(rows_BS: Tensor, eos_token_id: int) -> Tensor:
    """Return position ids (B, S) that restart after each end of text, which keeps the documents of a row apart."""
    places_BS = torch.arange(rows_BS.shape[1]).expand_as(rows_BS)
    starts_BS = torch.zeros_like(rows_BS)
    starts_BS[:, 1:] = places_BS[:, 1:] * (rows_BS[:, :-1] == eos_token_id)
    return places_BS - starts_BS.cummax(dim=1).values


def _batches(rows_NS: Tensor, settings: PretrainSettings) -> Iterator[Tensor]:
    """Yield exactly `steps` batches (B, S), in a new order each time all rows were used."""
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    for _ in range(settings.steps):
        while len(order) < settings.rows_per_step:
            order += torch.randperm(len(rows_NS), generator=generator).tolist()
        chosen, order = order[: settings.rows_per_step], order[settings.rows_per_step :]
        yield rows_NS[chosen]


def _parameter_groups(model: Any, weight_decay: float) -> list[dict]:
    """Return parameter groups: weight decay for matrices, none for biases (also 2-D stacks of experts') and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith("bias")]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _cosine_with_warmup(step: int, settings: PretrainSettings) -> float:
    """Return the learning rate's factor: a linear rise, then half a cosine down to a tenth."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))
