"""Steps whose loss or gradient is not finite: skipped and counted; too many in a row end the run.

One NaN in a gradient makes every weight it reaches NaN, and the optimiser's averages with them, for good.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from lola_ft.errors import UserError
from lola_ft.training.batch_rows import Document, documents_of

_ROWS_NAMED = 8


@dataclass
class Skipped:
    """Counts of skipped steps: so far, in a row until now, since the last line with a loss."""

    total: int = 0
    in_a_row: int = 0
    unlogged: int = 0

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row, self.unlogged = state["total"], state["in_a_row"], state["unlogged"]


class SkipsNonFinite(Trainer):
    """Goes in front of a trainer class.

    Attributes:
        skipped: How many steps were.
        mean_loss: Of all steps that were not skipped, once training is over; None if there is none.
    """

    def __init__(
        self,
        *args: Any,
        max_nonfinite: int = 3,
        name_rows: Callable[[list[Document]], list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what the trainer takes.

        Args:
            max_nonfinite: So many skipped steps in a row end the run.
            name_rows: Says from which rows sequences come, `file:line`.
        """
        super().__init__(*args, **kwargs)
        self.max_nonfinite, self._name_rows = max_nonfinite, name_rows
        self.skipped = Skipped()
        self.mean_loss: float | None = None
        self._skipped_now = False
        self._steps_since_log = 1
        self._micro_batches: list[tuple[dict[str, Any], Tensor]] = []
        self._loss_before = torch.zeros(())
        self.kept["skipped"] = self.skipped

    def forget_micro_batches(self) -> None:
        """Those of a step that will not be made."""
        self._micro_batches = []

    # What transformers' loop calls

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self._micro_batches:
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_batches.append((inputs, loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last call before the optimiser's; `grad_norm` is not finite if any gradient is not."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses = torch.stack([loss for _, loss in self._micro_batches])
        scaled = getattr(self.accelerator, "scaler", None) is not None  # float16: overflows are the scaler's business
        finite = torch.isfinite(losses).all()
        if not scaled:
            finite &= torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if self.accelerator.num_processes > 1:  # all skip a step, or none
            finite = self.accelerator.reduce(finite.float(), reduction="sum") == self.accelerator.num_processes
        self._skipped_now = not finite.item()
        if self._skipped_now:
            self.skipped.total += 1
            self.skipped.in_a_row += 1
            self.skipped.unlogged += 1
            if not scaled:
                self.accelerator.gradient_state._set_sync_gradients(False)  # the optimiser then does nothing
        else:
            self.skipped.in_a_row = 0
            self._micro_batches = []
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._skipped_now:
            tr_loss.copy_(self._loss_before)
            if self.skipped.in_a_row >= self.max_nonfinite:
                self._give_up()
            self._skipped_now, self._micro_batches = False, []
        self._steps_since_log = self.state.global_step - self._globalstep_last_logged
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """A mean loss is that of the steps that were not skipped; without such there is none."""
        if "loss" in logs and self.skipped.unlogged:
            _correct(logs, "loss", self._steps_since_log, self.skipped.unlogged)
            logs["skipped_steps"], self.skipped.unlogged = self.skipped.total, 0
        if "train_loss" in logs:
            _correct(logs, "train_loss", self.state.global_step, self.skipped.total)
            self.mean_loss = logs.get("train_loss")
        super().log(logs, *args, **kwargs)

    def _give_up(self) -> None:
        """End the run. Neither weights nor checkpoints have anything of the skipped steps."""
        bad = [inputs for inputs, loss in self._micro_batches if not torch.isfinite(loss).item()]
        batches = bad or [inputs for inputs, _ in self._micro_batches]
        rows: list[str] = []
        if self._name_rows:
            rows = self._name_rows([document for inputs in batches for document in documents_of(inputs)])
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        held = f"The last batch held {', '.join(rows[:_ROWS_NAMED])}{more}. " if rows else ""
        raise UserError(
            f"step {self.state.global_step}: the loss or its gradient was not finite, {self.skipped.in_a_row} in a row "
            f"(guards.max_nonfinite is {self.max_nonfinite}). Nothing was learned from such a step, and checkpoints "
            f"are as they were. {held}Look at these rows, lower train.learning_rate, or compute in another base.dtype."
        )


def _correct(logs: dict[str, float], key: str, steps: int, skipped: int) -> None:
    """Divide a sum by the steps that it has something of."""
    if not skipped:
        return
    if steps > skipped:
        logs[key] *= steps / (steps - skipped)
    else:
        del logs[key]
