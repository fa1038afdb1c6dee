"""Steps whose loss or gradient is not finite: skipped and counted; too many in a row end the run.

One NaN in a gradient makes every weight it reaches NaN, and the optimiser's averages with them, for good.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lola_ft.errors import UserError
from lola_ft.training.trainers.batch_rows import Document, documents_of

_ROWS_NAMED = 8


@dataclass
class Skipped:
    """Counts of skipped steps: so far, in a row until now, since the last line with a loss."""

    total: int = 0
    in_a_row: int = 0
    unlogged: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row, self.unlogged = state["total"], state["in_a_row"], state["unlogged"]


class NonFiniteSteps:
    """Decides for every step whether it counts. Its trainer calls the methods in their order here.

    Attributes:
        skipped: How many steps did not.
        mean_loss: The mean over all steps that count, once training is over; None if there is none.
        micro_batches: Inputs and loss of this step's micro batches until now.
    """

    def __init__(self, limit: int = 3, name_rows: Callable[[list[Document]], list[str]] | None = None) -> None:
        """Let `limit` skipped steps in a row end the run; `name_rows` finds the rows (`file:line`) of sequences."""
        self.limit, self._name_rows = limit, name_rows
        self.skipped = Skipped()
        self.mean_loss: float | None = None
        self.micro_batches: list[tuple[dict[str, Any], Tensor]] = []
        self._skips_now = False
        self._steps_since_log = 1
        self._sum_before = torch.zeros(())

    def before_micro_batch(self, loss_sum: Tensor) -> None:
        """Remember the sum of losses before a step's first micro batch."""
        if not self.micro_batches:
            self._sum_before = loss_sum.clone()

    def after_micro_batch(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Remember a micro batch until its step is judged."""
        self.micro_batches.append((inputs, loss))

    def judge(self, grad_norm: Tensor | float, accelerator: Accelerator) -> None:
        """Make the optimiser skip this step if a loss or the gradients' norm is not finite, in any process."""
        losses = torch.stack([loss for _, loss in self.micro_batches])
        scaled = getattr(accelerator, "scaler", None) is not None  # float16: overflows are the scaler's business
        finite = torch.isfinite(losses).all()
        if not scaled:
            finite &= torch.isfinite(torch.as_tensor(grad_norm, device=finite.device))
        if accelerator.num_processes > 1:  # all skip a step, or none
            finite = accelerator.reduce(finite.float(), reduction="sum") == accelerator.num_processes
        self._skips_now = not finite.item()
        if not self._skips_now:
            self.skipped.in_a_row = 0
            self.forget_micro_batches()
            return
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        self.skipped.unlogged += 1
        if not scaled:
            accelerator.gradient_state._set_sync_gradients(False)  # the optimiser then does nothing

    def end_step(self, step: int, steps_since_log: int, loss_sum: Tensor) -> None:
        """Take a skipped step's losses out of their sum, in place; one skip too many ends the run, naming its rows."""
        self._steps_since_log = steps_since_log
        if not self._skips_now:
            return
        loss_sum.copy_(self._sum_before)
        if self.skipped.in_a_row >= self.limit:
            self._give_up(step)
        self._skips_now = False
        self.forget_micro_batches()

    def correct(self, logs: dict[str, float], step: int) -> None:
        """Make mean losses those of the steps that count, in place; without such there is none."""
        if "loss" in logs and self.skipped.unlogged:
            _divide_by_fewer(logs, "loss", self._steps_since_log, self.skipped.unlogged)
            logs["skipped_steps"], self.skipped.unlogged = self.skipped.total, 0
        if "train_loss" in logs:
            _divide_by_fewer(logs, "train_loss", step, self.skipped.total)
            self.mean_loss = logs.get("train_loss")

    def forget_micro_batches(self) -> None:
        """Forget this step's micro batches, as when the step will not be made."""
        self.micro_batches = []

    def _give_up(self, step: int) -> None:
        """End the run. Neither weights nor checkpoints have anything of the skipped steps."""
        bad = [inputs for inputs, loss in self.micro_batches if not torch.isfinite(loss).item()]
        batches = bad or [inputs for inputs, _ in self.micro_batches]
        rows: list[str] = []
        if self._name_rows:
            rows = self._name_rows([document for inputs in batches for document in documents_of(inputs)])
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        held = f"The last batch held {', '.join(rows[:_ROWS_NAMED])}{more}. " if rows else ""
        raise UserError(
            f"step {step}: the loss or its gradient was not finite, {self.skipped.in_a_row} in a row "
            f"(guards.max_nonfinite is {self.limit}). Nothing was learned from such a step, and checkpoints "
            f"are as they were. {held}Look at these rows, lower train.learning_rate, or compute in another base.dtype."
        )


def _divide_by_fewer(logs: dict[str, float], key: str, steps: int, skipped: int) -> None:
    """Turn a mean over all steps into one over those that were not skipped."""
    if not skipped:
        return
    if steps > skipped:
        logs[key] *= steps / (steps - skipped)
    else:
        del logs[key]
