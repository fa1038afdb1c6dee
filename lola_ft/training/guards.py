"""The guards that a recipe asks for, put on a trainer. Their states are part of its checkpoints."""

from typing import Any

from lola_ft.errors import UserError
from lola_ft.recipe.schema import Guards, Train
from lola_ft.training.alarm import Alarm
from lola_ft.training.best import Best
from lola_ft.training.by_language import BY_LANGUAGE
from lola_ft.training.dataset import RunData
from lola_ft.training.forgetting import Forgetting
from lola_ft.training.loss_spike import LossSpike
from lola_ft.training.metrics import MetricsFile
from lola_ft.training.preference import DpoTrainer, KtoTrainer
from lola_ft.training.router_load import RouterCollapse, RouterLoad
from lola_ft.training.router_probe import RouterProbe
from lola_ft.training.trainer import LolaTrainer


def add_guards(
    trainer: LolaTrainer | DpoTrainer | KtoTrainer, guards: Guards, train: Train, metrics: MetricsFile
) -> None:
    """Put on what the recipe asks for. The order matters: the metrics' line is written before a guard speaks of it.

    What looks at tokens of one kind (routers, languages) is for text and answers, not for preferences.

    Args:
        trainer: With its adapter as it is before the first step.
    """

    def add(name: str, guard: Any) -> None:
        trainer.kept[name] = guard
        trainer.add_callback(guard)

    def alarm(kind: str) -> Alarm:
        return Alarm(kind, metrics)

    if guards.loss_spike:
        add("loss_spike", LossSpike(guards.loss_spike, alarm("loss_spike")))
    routed = hasattr(trainer.model.config, "num_experts")  # a dense baseline has no routers to guard
    if isinstance(trainer, LolaTrainer):
        if routed and guards.router_collapse != "off":
            add("router_collapse", _watch_load(trainer, guards, alarm("router_collapse")))
        if routed and guards.router_flips:
            trainer.router_probe = RouterProbe(trainer.model, trainer.processing_class)
        if trainer.eval_dataset is not None and train.eval_every and guards.forgetting:
            add("forgetting", Forgetting(trainer, guards.forgetting, alarm("forgetting")))
    if train.early_stopping or train.keep_best:
        stopping = train.early_stopping
        best = Best(stopping.metric, stopping.patience, stopping.min_delta) if stopping else Best()
        trainer.best, trainer.keep_best = best, train.keep_best
        add("best", best)


def _watch_load(trainer: LolaTrainer, guards: Guards, alarm: Alarm) -> RouterCollapse:
    """Count from now on where tokens go; returns who looks at the counts."""
    trainer.router_load = trainer.kept["router_load"] = RouterLoad(trainer.model)
    stop, num_experts = guards.router_collapse == "stop", trainer.model.config.num_experts
    return RouterCollapse(guards.min_load_entropy, guards.max_load_share, num_experts, stop, alarm)


def refuse_unknown_metric(train: Train, data: RunData, objective: str) -> None:
    """Refuse early stopping by a metric that no evaluation will have.

    Raises:
        UserError: Listing those that there are.
    """
    languages = sorted(set(data.validation.languages)) if data.validation and objective == "sft" else []
    known = ["eval_loss", *(f"{BY_LANGUAGE}/{code}" for code in languages)]
    if train.early_stopping and train.early_stopping.metric not in known:
        raise UserError(
            f"train.early_stopping.metric: there is no '{train.early_stopping.metric}'. Choose one of "
            f"{', '.join(known)}."
        )
