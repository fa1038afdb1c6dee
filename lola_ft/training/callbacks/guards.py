"""Adding the guards of a recipe to a trainer. Their states are part of its checkpoints.

loss_guards.py      a loss that jumps, languages that the model forgets
router_guards.py    a router that collapses, choices of experts that change
best_evaluation.py  early stopping, keeping the best checkpoint
Steps that are not finite are handled by the trainer itself: `trainers/nonfinite_steps.py`.
"""

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from lola_ft.families import architecture_of
from lola_ft.recipe import Recipe
from lola_ft.training.callbacks.alarm import Alarm
from lola_ft.training.callbacks.best_evaluation import BestEvaluation
from lola_ft.training.callbacks.loss_guards import Forgetting, LossSpike
from lola_ft.training.callbacks.router_guards import RouterCollapse, RouterLoad, RouterProbe
from lola_ft.training.reports.metrics import MetricsFile

if TYPE_CHECKING:
    from lola_ft.training.trainers.run_trainer import RunTrainer


def add_guards(trainer: "RunTrainer", recipe: Recipe, metrics: MetricsFile) -> None:
    """Add the recipe's guards to a trainer whose adapter is in its state before the first step.

    Guards of routers and languages are only for the objective sft.
    """
    guards, train = recipe.guards, recipe.train

    def add(name: str, guard: TrainerCallback) -> None:
        trainer.run.kept[name] = guard
        trainer.add_callback(guard)

    if guards.loss_spike:
        add("loss_spike", LossSpike(guards.loss_spike, Alarm("loss_spike", metrics)))
    architecture = architecture_of(trainer.model.config)
    routed = architecture.family.routing is not None
    if recipe.objective == "sft":
        if routed and guards.router_collapse != "off":
            trainer.router_load = trainer.run.kept["router_load"] = RouterLoad(trainer.model)
            limits, stop = (guards.min_load_entropy, guards.max_load_share), guards.router_collapse == "stop"
            alarm = Alarm("router_collapse", metrics)
            frozen = recipe.router.mode == "frozen"
            add("router_collapse", RouterCollapse(*limits, architecture.num_experts, stop, alarm, frozen))
        if routed and guards.router_flips:
            trainer.router_probe = RouterProbe(trainer.model, trainer.processing_class)
        if trainer.eval_dataset is not None and train.eval_every and guards.forgetting:
            add("forgetting", Forgetting(trainer.evaluate, guards.forgetting, Alarm("forgetting", metrics)))
    if train.early_stopping or train.keep_best:
        stopping = train.early_stopping.model_dump() if train.early_stopping else {}
        trainer.run.best = BestEvaluation(**stopping, keep=train.keep_best)
        add("best", trainer.run.best)
