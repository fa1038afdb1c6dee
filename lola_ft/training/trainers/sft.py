"""TRL's SFTTrainer with our loss: labelled tokens only, the family's load-balancing term, evaluation by language."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_outputs import ModelOutput
from trl import SFTTrainer

from lola_ft.families import architecture_of
from lola_ft.families.balancing import balancing_loss
from lola_ft.model.router import real_tokens, router_z_loss
from lola_ft.training import processes
from lola_ft.training.callbacks.router_guards import RouterLoad, RouterProbe
from lola_ft.training.checkpointing.rng import untouched_rng
from lola_ft.training.reports.metrics import FLIP_RATE
from lola_ft.training.trainers.language_evaluation import evaluate_languages, sum_of_batch
from lola_ft.training.trainers.run_trainer import RunTrainer


class SftTrainer(RunTrainer, SFTTrainer):
    """Trains an adapter on token ids and labels.

    Attributes:
        router_load: Counts the tokens of each expert while training, for the log lines.
        router_probe: Measures the share of changed expert choices at evaluations and checkpoints.
        loss_sums: Sum of losses and number of labels in the current evaluation (2,), float64.
    """

    def __init__(self, *args: Any, aux_loss_coef: float = 0.0, z_loss_coef: float = 0.0, **kwargs: Any) -> None:
        config = kwargs["model"].config
        own_coef = getattr(config, "router_aux_loss_coef", None)
        super().__init__(*args, **kwargs)
        # TRL 1.16 writes its own aux-loss settings into the config and would add Mixtral's formula.
        config.output_router_logits = False
        if own_coef is not None:
            config.router_aux_loss_coef = own_coef
        self.aux_loss_enabled = False
        self.aux_loss_coef, self.z_loss_coef = aux_loss_coef, z_loss_coef
        self._architecture = architecture_of(config)
        self.router_load: RouterLoad | None = None
        self.router_probe: RouterProbe | None = None
        self.loss_sums = torch.zeros(2)

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Return the cross-entropy of the labelled tokens, plus the weighted router losses while training.

        The cross-entropy is divided by the number of labels of the whole optimiser step, so 1 micro batch of 8 rows
        equals 8 of 1 row. DDP also divides by the number of processes, which is undone here. Router losses are means
        over each micro batch's tokens, averaged over the micro batches, so they depend on the split.
        """
        training = model.training
        routers = training and (self.aux_loss_coef > 0 or self.z_loss_coef > 0)
        if self.router_load is not None:
            self.router_load.token_mask_T = real_tokens(inputs.get("attention_mask"), inputs["input_ids"].shape[1])
        outputs = model(
            **inputs,
            use_cache=False,
            skip_logits=True,
            output_router_logits=routers,
            num_items_in_batch=num_items_in_batch,
        )
        loss = outputs.loss
        if num_items_in_batch is not None and training:
            loss = loss * processes.count()
        if routers:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self._router_losses(outputs, inputs) / steps
        return (loss, outputs) if return_outputs else loss

    def _router_losses(self, outputs: ModelOutput, inputs: dict[str, Any]) -> Tensor:
        """Return the weighted sum of the recipe's router losses, and log each separately."""
        total = torch.zeros((), device=outputs.loss.device)
        mask = real_tokens(inputs.get("attention_mask"), inputs["input_ids"].shape[1])
        for name, coef, function in (
            ("aux_loss", self.aux_loss_coef, partial(balancing_loss, self._architecture)),
            ("z_loss", self.z_loss_coef, router_z_loss),
        ):
            if coef > 0:
                value = function(outputs.router_logits, mask)
                self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
                total = total + coef * value
        return total

    # Measures of the router

    def measures_with_loss(self) -> dict[str, float]:
        return {} if self.router_load is None else self.router_load.read()

    def before_checkpoint(self) -> None:
        if self.router_probe is None:
            return
        wanted = self.control.should_log
        # transformers' own log: TRL's would put the metrics gathered for the next line of losses into this line
        Trainer.log(self, {FLIP_RATE: self.router_probe.flip_rate()})
        self.control.should_log = wanted

    # Evaluation, for an `eval_dataset` that is a dictionary of datasets by language code

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if args or kwargs.get("eval_dataset") is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(*args, **kwargs)
        with untouched_rng():
            metrics = evaluate_languages(self, self.eval_dataset)
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        sums = sum_of_batch(self, model, self._prepare_inputs(inputs))
        self.loss_sums += sums
        return (sums[0] / sums[1].clamp(min=1)).float(), None, None
