"""The common base of the trainers: our checkpoints, stopping between two steps, skipping steps that are not finite, and
counting tokens.

A trainer derives from `RunTrainer` and one of TRL's trainers: `class SftTrainer(RunTrainer, SFTTrainer)`. A subclass
adds to a run in two hooks, `measures_with_loss` and `before_checkpoint`. The overridden private methods of transformers
are listed with their reasons in `docs/internals.md`; a test compares the list with the code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import KwargsHandler
from torch import Tensor, nn
from transformers import Trainer

from lola_ft.errors import UserError
from lola_ft.training import processes
from lola_ft.training.callbacks.stop_request import EvaluationStopped, Stopped
from lola_ft.training.checkpointing import contents
from lola_ft.training.checkpointing.checkpoint import Checkpoint, read_whole, step_folder, write_checkpoint
from lola_ft.training.checkpointing.longer import planned_steps
from lola_ft.training.checkpointing.rng import untouched_rng
from lola_ft.training.run_state import RunState
from lola_ft.training.trainers.nonfinite_steps import NonFiniteSteps


class RunTrainer(Trainer):
    """The base of the three trainers.

    Attributes:
        run: The run's counts and state, shared with the callbacks.
        nonfinite: Decides which steps are skipped.
        facts: Facts stored in each checkpoint, which a resumed run compares.
        metrics_file: The run's metrics file; each checkpoint has a copy.
        resumed: The checkpoint that training resumes from; None at the beginning.
        saved_step: The step of the newest checkpoint.
        length_changed: True if the run's length differs from that before the resume.
    """

    def __init__(
        self,
        *args: Any,
        run: RunState | None = None,
        nonfinite: NonFiniteSteps | None = None,
        keep_checkpoints: int = 2,
        metrics_file: Path | None = None,
        facts: dict[str, Any] | None = None,
        lora_plus_ratio: float = 1.0,
        extended_schedule: str = "stretch",
        **kwargs: Any,
    ) -> None:
        """Take the arguments of TRL's trainer, and our own.

        Args:
            lora_plus_ratio: Learning rate of LoRA's B divided by that of A.
            extended_schedule: `stretch` or `restart` the schedule if the run is made longer.
        """
        super().__init__(*args, **kwargs)
        self.run = run or RunState()
        self.nonfinite = nonfinite or NonFiniteSteps()
        self.run.kept["skipped"] = self.nonfinite.skipped
        self.keep_checkpoints, self.metrics_file, self.facts = keep_checkpoints, metrics_file, facts or {}
        self.lora_plus_ratio, self.extended_schedule = lora_plus_ratio, extended_schedule
        self.length_changed = False
        self.resumed: Checkpoint | None = None
        self.saved_step = 0
        self.add_callback(self.run.stop)
        self.add_callback(
            contents.PutBack(self)
        )  # acts first when training begins, because other callbacks read the restored state

    # Hooks of the subclasses

    def measures_with_loss(self) -> dict[str, float]:
        """Return measures to log together with the training loss."""
        return {}

    def before_checkpoint(self) -> None:
        """Take and log measurements before an evaluation or a checkpoint."""

    # What a run calls

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from the beginning or a checkpoint; on a stop request, save and raise Stopped."""
        self.resumed = checkpoint
        self.run.begin()
        self.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        self._save_checkpoint(
            self.model, None
        )  # the work that follows, such as the last evaluation, can be interrupted too

    def use_best(self) -> int | None:
        """Restore the weights of the best evaluation after training; returns its step."""
        best = self.run.best
        if best is None or not best.keep or best.step is None:
            return None
        if best.step != self.state.global_step:
            folder = step_folder(Path(self.args.output_dir), best.step)
            try:
                stored = read_whole(folder).state["weights"]
            except ValueError as error:
                raise UserError(
                    f"{folder}: the best checkpoint is damaged ({error}). End with the last step's adapter: "
                    "--resume train.keep_best=false --allow-changed train.keep_best"
                ) from error
            contents.put_weights_back(self, stored, folder)
        return best.step

    # Public methods of transformers' trainer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimiser; with LoRA+, all B matrices get parameter groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.lora_plus_ratio != 1:
            raise_rate_of_b(optimizer, self.model, self.lora_plus_ratio)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the whole run; a restarted schedule begins at the step where the run was made longer."""
        if self.resumed is not None:
            self._note_length(self.resumed, num_training_steps)
        begins = max((change["step"] for change in self.run.extensions if change["schedule"] == "restart"), default=0)
        steps, warmup = num_training_steps - begins, self.args.warmup_steps
        self.args.warmup_steps = round(warmup * steps / num_training_steps)
        scheduler = super().create_scheduler(steps, optimizer)
        self.args.warmup_steps = warmup
        if begins:
            scheduler.lr_lambdas = [_later(factor, begins) for factor in scheduler.lr_lambdas]
        return scheduler

    def _note_length(self, checkpoint: Checkpoint, steps: int) -> None:
        """Copy the earlier changes of the run's length from a checkpoint, and add the present change, if any."""
        before = planned_steps(checkpoint.folder)
        self.length_changed = steps != before
        change = {"step": checkpoint.step, "from": before, "to": steps, "schedule": self.extended_schedule}
        self.run.extensions = [*checkpoint.state.get("extensions", []), *([change] if self.length_changed else [])]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """Return no batches after the last step: transformers would do one more step if a finished run resumes."""
        best = self.run.best
        if self.state.global_step >= self.state.max_steps or (best is not None and best.stopped):
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute one micro batch, and count its tokens."""
        mask = inputs.get("attention_mask")
        self.run.own_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        self.nonfinite.before_micro_batch(self._tr_loss)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.nonfinite.after_micro_batch(inputs, loss)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing training's random numbers, so that more or fewer evaluations change nothing."""
        with untouched_rng():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.measures_with_loss()
        self.nonfinite.correct(logs, self.state.global_step)
        super().log(logs, *args, **kwargs)

    # Private methods of transformers' trainer; docs/internals.md has the reason for each

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for value in (*args.values(), *args.get("kwargs_handlers", ())):
            if isinstance(value, KwargsHandler):
                processes.leave_environment(value)
        return args

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Decide whether to skip the step. This is the last call before the optimiser's step."""
        norm: Tensor | float = super()._get_grad_norm(model, grad_norm)
        self.nonfinite.judge(norm, self.accelerator)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Count the finished step, then log, evaluate and save if due, and stop if requested."""
        self.run.end_step()
        step = self.state.global_step
        self.nonfinite.end_step(step, step - self._globalstep_last_logged, tr_loss)
        if self.control.should_evaluate or self.control.should_save:
            self.before_checkpoint()
        try:
            super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        except EvaluationStopped:
            self.run.evaluation_due = True
        if self.control.should_training_stop:  # saved here, because the end of the loop clears sums that are needed
            self._save_checkpoint(self.model, None)
        if processes.total(self.run.stop.requested):  # if one process was asked to stop, all stop
            self._save_checkpoint(self.model, None)
            raise Stopped

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        """Write `step-N`, unless this step has a checkpoint already."""
        step = self.state.global_step
        if step == self.saved_step:
            return
        own, folder = processes.of_all(contents.of_process(self)), Path(self.args.output_dir)
        best = self.run.best.step if self.run.best is not None and self.run.best.keep else None

        def write() -> None:
            write_checkpoint(folder, step, lambda new: contents.fill(new, self, own), self.keep_checkpoints, best)

        processes.on_main(write)
        self.saved_step = step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: weights are restored together with all other state when training begins."""


def _later(factor: Callable[[int], float], begins: int) -> Callable[[int], float]:
    """Return a schedule that begins at step `begins`."""
    return lambda step: factor(max(0, step - begins))


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Move every LoRA B to a new group with `ratio` times its group's learning rate (LoRA+, arXiv 2402.12354)."""
    factors = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in factors]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in factors]
            optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * ratio})
