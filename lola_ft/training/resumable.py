"""A trainer whose checkpoints are ours: everything that decides the next steps, exactly, and no pickle.

transformers calls its own methods to save and load; they are overridden here. What its loop keeps to itself (the sums
of losses) is put back when training begins, the random numbers' states after the batches that were done are skipped.
"""

import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import KwargsHandler
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from lola_ft.adapters import fitting_layout
from lola_ft.baseline.either import save_adapter
from lola_ft.errors import UserError
from lola_ft.training import processes
from lola_ft.training.best import Best
from lola_ft.training.checkpoint import PREFIX, Checkpoint, read_whole, write_checkpoint
from lola_ft.training.rng import rng_state, set_rng_state, untouched_rng
from lola_ft.training.run_folder import METRICS_FILE
from lola_ft.training.state_file import write_state
from lola_ft.training.stopping import EvaluationStopped, Stopped, StopRequest


class Kept(Protocol):
    """Something with a state of its own, which decides what the next steps do or write."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class ResumableTrainer(Trainer):
    """What stands before one of TRL's trainers: saves and restores it exactly, stops between two steps when asked to.

    Attributes:
        tokens_seen: Tokens of all training batches of all processes, padding left out; counted after each step.
        own_tokens: Those of this process since the last step.
        train_seconds: Time spent in training, that before a resume included.
        best: Follows the evaluations, if somebody wants to know the best.
        keep_best: Whether the best evaluation's checkpoint is written and kept.
        kept: By name, what else has a state that checkpoints hold.
    """

    def __init__(
        self,
        *args: Any,
        stop: StopRequest | None = None,
        keep_checkpoints: int = 2,
        metrics_file: Path | None = None,
        facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what TRL's trainer takes.

        Args:
            stop: Whether somebody asked to stop.
            metrics_file: What the metrics are written to; each checkpoint has a copy.
            facts: Kept in each checkpoint, for the resuming run to compare.
        """
        super().__init__(*args, **kwargs)
        self.stop = stop or StopRequest()
        self.keep_checkpoints = keep_checkpoints
        self.metrics_file = metrics_file
        self.facts = facts or {}
        self.kept: dict[str, Kept] = {}
        self.best: Best | None = None
        self.keep_best = False
        self.tokens_seen = 0
        self.own_tokens = 0
        self._resumed: Checkpoint | None = None
        self._saved_step = 0
        self._evaluation_due = False
        self._seconds_before, self._began = 0.0, time.perf_counter()
        self.add_callback(self.stop)
        self.add_callback(_RestoreLoop(self))

    @property
    def train_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    def train_from(self, checkpoint: Checkpoint | None) -> Any:
        """Train to the end, from the beginning or from a checkpoint that was read whole."""
        self._resumed = checkpoint
        self._began = time.perf_counter()
        result = self.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        self._save_checkpoint(self.model, None)  # what is left to do, such as the last evaluation, can be cut off too
        return result

    # What transformers' trainer calls

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for value in (*args.values(), *args.get("kwargs_handlers", ())):
            if isinstance(value, KwargsHandler):
                processes.leave_environment(value)
        return args

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.tokens_seen += processes.total(self.own_tokens)
        self.own_tokens = 0
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._evaluation_due = True
        if processes.total(self.stop.requested):  # one was asked, all stop
            self._save_checkpoint(self.model, None)
            raise Stopped

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation of the loop's own; the best one is worth a checkpoint."""
        metrics = super()._evaluate(*args, **kwargs)
        if self.keep_best and self.best is not None and self.best.step == self.state.global_step:
            self.control.should_save = True
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluating draws no random numbers from training, so that it may be done more or less often, or again."""
        with untouched_rng():
            return super().evaluate(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """No batches after the last step: transformers would do one more on resuming a run that had done them all."""
        if self.state.global_step >= self.state.max_steps or (self.best is not None and self.best.stopped):
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        """Write `step-N` (transformers' own would write pickles, TRL's a model card)."""
        step = self.state.global_step
        if step == self._saved_step:
            return
        own = processes.of_all({"rng": rng_state(), "loop": self._loop_state()})
        best = self.best.step if self.best is not None and self.keep_best else None

        def write() -> None:
            folder = Path(self.args.output_dir)
            write_checkpoint(folder, step, lambda partial: self._fill(partial, own), self.keep_checkpoints, best)

        processes.on_main(write)
        self._saved_step = step

    def _fill(self, folder: Path, own: list[dict[str, Any]]) -> None:
        model = self.accelerator.unwrap_model(self.model)
        save_adapter(model, folder / "adapter", fitting_layout(model))
        write_state(folder, self._state(own))
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.metrics_file is not None and self.metrics_file.exists():
            shutil.copyfile(self.metrics_file, folder / METRICS_FILE)

    def _state(self, own: list[dict[str, Any]]) -> dict[str, Any]:
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "facts": self.facts,
            "weights": dict(self._trained()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": own,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.train_seconds,
            "evaluation_due": self._evaluation_due,
            "kept": {name: kept.state() for name, kept in self.kept.items()},
        }

    def _loop_state(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "flos": self.current_flos,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "total_train_tokens": self._total_train_tokens,
        }

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        model = self.accelerator.unwrap_model(self.model)
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:  # noqa: ARG002
        """Put the trained weights back, every one of them."""
        self._put_back(self._of(resume_from_checkpoint).pop("weights"), resume_from_checkpoint)

    def use_best(self) -> int | None:
        """Put the weights of the best evaluation back, when training is over; returns its step.

        Raises:
            UserError: Its checkpoint cannot be read.
        """
        if self.best is None or not self.keep_best or self.best.step is None:
            return None
        if self.best.step != self.state.global_step:
            folder = Path(self.args.output_dir) / f"{PREFIX}-{self.best.step}"
            try:
                stored = read_whole(folder).state["weights"]
            except ValueError as error:
                raise UserError(
                    f"{folder}: the best checkpoint is damaged ({error}). End with the last step's adapter: "
                    "--resume train.keep_best=false --allow-changed train.keep_best"
                ) from error
            self._put_back(stored, str(folder))
        return self.best.step

    def _put_back(self, stored: dict[str, Tensor], where: str) -> None:
        trained = dict(self._trained())
        fits = stored.keys() == trained.keys() and all(stored[name].shape == trained[name].shape for name in stored)
        if not fits:
            raise UserError(
                f"{where}: this checkpoint holds other weights than the recipe trains. Go on with "
                "the recipe that the run was started with."
            )
        for name, parameter in trained.items():
            parameter.data.copy_(stored[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._of(checkpoint)
        asked = [(group["initial_lr"], group.get("weight_decay")) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state.pop("optimizer"))
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint}: the optimiser's state does not fit the recipe's ({error}).") from error
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self._follow_recipe(asked)
        self.tokens_seen = state["tokens_seen"]
        self._seconds_before = state["train_seconds"]
        self._saved_step = self.state.global_step

    def _follow_recipe(self, asked: list[tuple[float, float | None]]) -> None:
        """A checkpoint's states hold rates and decays as well; a recipe that was allowed to change them decides."""
        for group, (rate, decay) in zip(self.optimizer.param_groups, asked, strict=True):
            if rate != group["initial_lr"]:
                group["lr"] *= rate / group["initial_lr"]  # a schedule's factor stays
                group["initial_lr"] = rate
            if decay is not None:
                group["weight_decay"] = decay
        self.lr_scheduler.base_lrs = [rate for rate, _ in asked]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._of(checkpoint)["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self._of(checkpoint)["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(self._of(checkpoint)["processes"][processes.index()]["rng"])

    def restore_loop(self) -> None:
        """Put back what the loop has just reset, and do the evaluation that the stop left out."""
        if self._resumed is None:
            processes.draw_apart(self.args.seed)
            return
        for name, state in self._resumed.state.get("kept", {}).items():
            if name in self.kept:
                self.kept[name].restore(state)
        loop = self._resumed.state["processes"][processes.index()]["loop"]
        self._tr_loss.fill_(loop["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
        self._initial_global_step = 0  # the mean loss is that of all steps
        self.current_flos, self._total_train_tokens = loop["flos"], loop["total_train_tokens"]
        self._metrics["train"].update({name: list(values) for name, values in loop["metrics"].items()})
        self.state.compute_steps(self.args, self.state.max_steps)  # how often to log, evaluate and save may change
        if self._resumed.state["evaluation_due"]:
            try:
                self._evaluate(None, None)
            except EvaluationStopped:
                raise Stopped from None  # the checkpoint says already that it is due

    def _of(self, checkpoint: str) -> dict[str, Any]:
        assert self._resumed is not None, "a checkpoint is read and checked before training goes on from it"
        assert str(self._resumed.folder) == checkpoint, f"{checkpoint} is not the checkpoint that was read"
        return self._resumed.state


class _RestoreLoop(TrainerCallback):
    """Calls the trainer back at the moment when its loop has set everything to zero."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._trainer.restore_loop()
