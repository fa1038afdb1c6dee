"""TRL's SFTTrainer with LOLA's loss: labelled rows only, LOLA's own load-balancing term."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from lola_ft.model.modeling import real_tokens
from lola_ft.model.router import load_balancing_loss, router_z_loss
from lola_ft.training import processes
from lola_ft.training.by_language import EvaluatesLanguages
from lola_ft.training.lora_plus import LoraPlus
from lola_ft.training.nonfinite import SkipsNonFinite
from lola_ft.training.resumable import ResumableTrainer
from lola_ft.training.router_load import RouterLoad
from lola_ft.training.router_probe import RouterProbe


class LolaTrainer(SkipsNonFinite, EvaluatesLanguages, LoraPlus, ResumableTrainer, SFTTrainer):
    """Trains an adapter on token ids and labels.

    Attributes:
        router_load: Counts the tokens of each expert while training, for the log lines.
        router_probe: Says at evaluations and checkpoints how many choices of experts have changed.
    """

    def __init__(
        self,
        *args: Any,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        own_coef = model.config.router_aux_loss_coef
        super().__init__(*args, **kwargs)
        # TRL 1.16 writes its own aux-loss settings into the config and would add Mixtral's formula.
        model.config.router_aux_loss_coef, model.config.output_router_logits = own_coef, False
        self.aux_loss_enabled = False
        self.aux_loss_coef, self.z_loss_coef = aux_loss_coef, z_loss_coef
        self.router_load: RouterLoad | None = None
        self.router_probe: RouterProbe | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Cross-entropy of the labelled tokens, plus the weighted losses of the routers while training.

        The cross-entropy is divided by the labels of the whole optimiser step, so 1x8 equals 8x1; DDP divides by the
        processes again, which is undone here. The routers' losses are means over each micro batch's own tokens,
        averaged over the micro batches: they do depend on the split.
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
        if training:
            mask = inputs.get("attention_mask")
            self.own_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.router_load is not None and "loss" in logs:
            logs |= self.router_load.read()
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.router_probe is not None and (self.control.should_evaluate or self.control.should_save):
            wanted = self.control.should_log
            # transformers' own: TRL's would take what it has gathered for the next line of losses into this one
            Trainer.log(self, {"router_flip_rate": self.router_probe.flip_rate()})
            self.control.should_log = wanted
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _router_losses(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """The weighted sum of the losses that the recipe asks for, each logged by itself."""
        total = torch.zeros((), device=outputs.loss.device)
        mask = real_tokens(inputs.get("attention_mask"), inputs["input_ids"].shape[1])
        for name, coef, function in (
            ("aux_loss", self.aux_loss_coef, load_balancing_loss),
            ("z_loss", self.z_loss_coef, router_z_loss),
        ):
            if coef > 0:
                value = function(outputs.router_logits, mask)
                self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
                total = total + coef * value
        return total
