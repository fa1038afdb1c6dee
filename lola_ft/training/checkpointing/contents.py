"""The contents of a checkpoint: everything that decides a run's next steps.

`state.json` and `state.safetensors` have these keys:

facts              facts that must be unchanged for exact resuming: base, data, versions, threads, processes
weights            every trained tensor, by name
optimizer, scheduler, scaler     their `state_dict`s; the scaler's is None except for float16
processes          per process: `rng` (the states of its random number generators) and `loop` (sums of losses)
tokens_seen, train_seconds, evaluation_due, extensions, kept    the `RunState`; `kept` has the guards' states by name

A resumed run computes bit for bit what the uninterrupted run would have computed. An example: 8 micro batches per
epoch, 2 per step, stopped after step 3 of 8 (6 micro batches of epoch 0 done):

1. transformers' loop begins and sets its sums to zero; then `PutBack` restores weights, optimiser, schedule and sums.
2. The loop draws the order of epoch 0 again from the seed, the same as before.
3. It skips the 6 micro batches done, which draws random numbers; then `PutBack` restores the random number generators.
4. Step 4 draws the same dropout masks, reads micro batches 6 and 7, and gives the same update as without the stop.
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
    """Write a checkpoint's files; `of_processes` holds the results of `of_process` of all processes."""
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
    """Return this process's own state: its random number generators, and the sums of transformers' loop."""
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
    """Restores a checkpoint into the trainer after transformers' loop has set its own sums to zero.

    Random number generators are restored last, at one of two moments. In the middle of an epoch, the loop first skips
    the batches already done, which draws random numbers, so the generators are restored before the first step. At the
    beginning of an epoch nothing is skipped, and the generators are restored before the loop draws the order of rows.
    """

    def __init__(self, trainer: "RunTrainer") -> None:
        self._trainer = trainer
        self._rng: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, *_: object, **__: object) -> None:
        if self._trainer.resumed is None:
            if processes.count() > 1:  # each process must draw other dropout masks
                set_seed(args.seed, device_specific=True)
            return
        state = self._trainer.resumed.state
        put_back(self._trainer, state, self._trainer.resumed.folder)
        self._rng = state["processes"][processes.index()]["rng"]  # restored later, by one of the next two methods

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        if self._rng is not None:  # before the order of rows is drawn: right for a whole number of epochs done
            set_rng_state(self._rng)

    def on_step_begin(self, _args: object, state: TrainerState, *_: object, **__: object) -> None:
        if self._rng is not None and not float(state.epoch).is_integer():  # after the skipped batches of a part epoch
            set_rng_state(self._rng)
        self._rng = None


class EvaluationDue(TrainerCallback):
    """Does an interrupted evaluation when training resumes. Add it last: the other callbacks must have begun."""

    def __init__(self, trainer: "RunTrainer") -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: object, **__: object) -> None:
        if not self._trainer.run.evaluation_due:
            return
        try:
            self._trainer._evaluate(None, None)
        except EvaluationStopped:
            raise Stopped from None  # the checkpoint already notes that it is due
        self._trainer.run.evaluation_due = False


def put_back(trainer: "RunTrainer", state: dict[str, Any], folder: Path) -> None:
    """Restore everything except random number generators, and free the checkpoint's copies of the large tensors."""
    # 1. Weights, optimiser, schedule and float16 scaler. `pop` frees the checkpoint's copy as soon as it is used.
    put_weights_back(trainer, state.pop("weights"), folder)
    _put_optimizer_back(trainer, state, folder)
    if state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    # 2. The run's own counts and guards; this step has a checkpoint already.
    trainer.run.load_state_dict(state)
    trainer.saved_step = trainer.state.global_step
    # 3. The sums of transformers' loop in this process, which the next log lines are made of.
    loop = state["processes"][processes.index()]["loop"]
    trainer._tr_loss.fill_(loop["loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
    trainer._initial_global_step = 0  # so that the mean loss is over all steps, not over those since the resume
    trainer.current_flos, trainer._total_train_tokens = loop["flos"], loop["total_train_tokens"]
    trainer._metrics["train"].update({name: list(values) for name, values in loop["metrics"].items()})
    # 4. The intervals of logging, evaluating and saving, which the recipe may have changed.
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)


def put_weights_back(trainer: "RunTrainer", stored: dict[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's weights into the trained weights; raises UserError if names or shapes differ."""
    trained = _trained(trainer.accelerator.unwrap_model(trainer.model))
    if {name: x.shape for name, x in stored.items()} != {name: x.shape for name, x in trained.items()}:
        raise UserError(
            f"{folder}: this checkpoint holds other weights than the recipe trains. Resume with the recipe that the "
            "run was started with."
        )
    for name, parameter in trained.items():
        parameter.data.copy_(stored[name])


def _put_optimizer_back(trainer: "RunTrainer", state: dict[str, Any], folder: Path) -> None:
    """Restore optimiser and schedule, with the recipe's learning rates and weight decays if those were changed.

    For example, a checkpoint has learning rate 1e-4 and its schedule is at factor 0.6, so `lr` is 6e-5. A recipe that
    was allowed to change the learning rate to 2e-4 goes on with 2e-4 · 0.6 = 1.2e-4.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    # Per parameter group: the learning rate and weight decay of the recipe, before the state overwrites them.
    asked = [(group["initial_lr"], group.get("weight_decay")) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state.pop("optimizer"))
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}: the optimiser's state does not fit the recipe's optimiser ({error}).") from error
    scheduler.load_state_dict(state["scheduler"])
    for group, (rate, decay) in zip(optimizer.param_groups, asked, strict=True):
        if rate != group["initial_lr"]:
            group["lr"] *= rate / group["initial_lr"]  # keeps the schedule's factor
            group["initial_lr"] = rate
        if decay is not None:
            group["weight_decay"] = decay
    scheduler.base_lrs = [rate for rate, _ in asked]
    if trainer.length_changed:  # the schedule of the new length gives the next step's rate
        for group, rate, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # the rates that are logged


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
