"""The contents of a checkpoint: everything that decides a run's next steps, taken from a trainer and put back into one.

`state.json` and `state.safetensors` have these keys:

facts              what must be the same for a run to go on exactly: base, data, versions, threads, processes
weights            every trained tensor by name
optimizer, scheduler, scaler     their `state_dict`s; the scaler's is None but for float16
processes          per process: `rng` (the states of its random number generators) and `loop` (sums of losses)
tokens_seen, train_seconds, evaluation_due, extensions, kept    the `RunState`; `kept` has the guards' states by name
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lola_ft.errors import UserError
from lola_ft.file_names import ADAPTER_FOLDER, METRICS_FILE
from lola_ft.training import processes
from lola_ft.training.base_model import save_adapter
from lola_ft.training.callbacks.stop_request import EvaluationStopped, Stopped
from lola_ft.training.checkpointing.rng import rng_state, set_rng_state
from lola_ft.training.checkpointing.state_file import write_state

if TYPE_CHECKING:
    from lola_ft.training.trainers.run_trainer import RunTrainer


def fill(folder: Path, trainer: "RunTrainer", of_processes: list[dict[str, Any]]) -> None:
    """Write a checkpoint's files; `of_processes` is what `of_process` has returned in each of them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    save_adapter(model, folder / ADAPTER_FOLDER)
    scaler = getattr(trainer.accelerator, "scaler", None)
    state = {
        "facts": trainer.facts,
        "weights": _trained(model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "processes": of_processes,
    }
    write_state(folder, state | trainer.run.state_dict())
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    if trainer.metrics_file is not None and trainer.metrics_file.exists():
        shutil.copyfile(trainer.metrics_file, folder / METRICS_FILE)


def of_process(trainer: "RunTrainer") -> dict[str, Any]:
    """Return what each process has for itself: random numbers, and the sums that transformers' loop keeps."""
    loop = {
        "loss": trainer._tr_loss.item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "flos": trainer.current_flos,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
        "total_train_tokens": trainer._total_train_tokens,
    }
    return {"rng": rng_state(), "loop": loop}


class PutBack(TrainerCallback):
    """Puts a checkpoint back into the trainer when its loop has set everything to zero.

    Random numbers come last. A resumed epoch begins by skipping the batches that were done, which draws some: the
    numbers are put back before its first step. At an epoch's very beginning nothing is skipped: they are put back
    before the loop draws the order of its rows.
    """

    def __init__(self, trainer: "RunTrainer") -> None:
        self._trainer = trainer
        self._rng: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, *_: object, **__: object) -> None:
        if self._trainer.resumed is None:
            if processes.count() > 1:  # dropout must not be the same in all of them
                set_seed(args.seed, device_specific=True)
            return
        state = self._trainer.resumed.state
        put_back(self._trainer, state, self._trainer.resumed.folder)
        self._rng = state["processes"][processes.index()]["rng"]

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        if self._rng is not None:
            set_rng_state(self._rng)

    def on_step_begin(self, _args: object, state: TrainerState, *_: object, **__: object) -> None:
        if self._rng is not None and not float(state.epoch).is_integer():
            set_rng_state(self._rng)
        self._rng = None


class EvaluationDue(TrainerCallback):
    """Does the evaluation that a stop left out, when training goes on. To be added last: others must have begun."""

    def __init__(self, trainer: "RunTrainer") -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: object, **__: object) -> None:
        if not self._trainer.run.evaluation_due:
            return
        try:
            self._trainer._evaluate(None, None)
        except EvaluationStopped:
            raise Stopped from None  # the checkpoint says already that it is due
        self._trainer.run.evaluation_due = False


def put_back(trainer: "RunTrainer", state: dict[str, Any], folder: Path) -> None:
    """Put everything but random numbers back, and free the checkpoint's copies of the large parts."""
    put_weights_back(trainer, state.pop("weights"), folder)
    _put_optimizer_back(trainer, state, folder)
    if state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.run.load_state_dict(state)
    trainer.saved_step = trainer.state.global_step
    loop = state["processes"][processes.index()]["loop"]
    trainer._tr_loss.fill_(loop["loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
    trainer._initial_global_step = 0  # the mean loss is that of all steps
    trainer.current_flos, trainer._total_train_tokens = loop["flos"], loop["total_train_tokens"]
    trainer._metrics["train"].update({name: list(values) for name, values in loop["metrics"].items()})
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)  # how often to log, evaluate, save may change


def put_weights_back(trainer: "RunTrainer", stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's weights into those that are trained; raises UserError if names or shapes are others."""
    trained = _trained(trainer.accelerator.unwrap_model(trainer.model))
    if {name: x.shape for name, x in stored.items()} != {name: x.shape for name, x in trained.items()}:
        raise UserError(
            f"{folder}: this checkpoint holds other weights than the recipe trains. Go on with "
            "the recipe that the run was started with."
        )
    for name, parameter in trained.items():
        parameter.data.copy_(stored[name])


def _put_optimizer_back(trainer: "RunTrainer", state: dict[str, Any], folder: Path) -> None:
    """Put optimiser and schedule back; a recipe that was allowed to change rates and decays decides them."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    asked = [(group["initial_lr"], group.get("weight_decay")) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state.pop("optimizer"))
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}: the optimiser's state does not fit the recipe's ({error}).") from error
    scheduler.load_state_dict(state["scheduler"])
    for group, (rate, decay) in zip(optimizer.param_groups, asked, strict=True):
        if rate != group["initial_lr"]:
            group["lr"] *= rate / group["initial_lr"]  # a schedule's factor stays
            group["initial_lr"] = rate
        if decay is not None:
            group["weight_decay"] = decay
    scheduler.base_lrs = [rate for rate, _ in asked]
    if trainer.length_changed:  # the next step's, by the schedule of the new length
        for group, rate, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
