"""Conversion of a recipe's training section to TRL's arguments."""

from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, KTOConfig, SFTConfig

from lola_ft.recipe import Recipe
from lola_ft.recipe.schema import Train
from lola_ft.training.packing import READY, STRATEGY
from lola_ft.training.precision import Precision

# Optimiser names that transformers spells differently; all other names are transformers' own.
_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}
_SMALLEST_MULTIPLE, _MOST_LENGTHS = 8, 16


def training_arguments(
    recipe: Recipe, checkpoints: Path, precision: Precision, device: torch.device, steps: int, evaluate: bool
) -> SFTConfig | DPOConfig | KTOConfig:
    """Return TRL's arguments for the recipe's objective; the warm-up is a share of the run's total `steps`."""
    train, data = recipe.train, recipe.data
    shared = _shared(train, checkpoints, precision, device, steps, evaluate) | {
        "max_length": data.max_length,
        # Packed rows are flattened, and a padding token would be a sequence of its own.
        "pad_to_multiple_of": None if data.packing else padding_multiple(data.max_length, device),
    }
    config: SFTConfig | DPOConfig | KTOConfig
    if recipe.objective == "dpo":
        config = DPOConfig(**shared, beta=train.beta, loss_type=[train.loss_type])
    elif recipe.objective == "kto":
        config = KTOConfig(**shared, beta=train.beta, loss_type=train.loss_type, train_sampling_strategy="sequential")
    else:
        config = SFTConfig(**shared, packing=data.packing, packing_strategy=STRATEGY, dataset_kwargs=READY)
    if not (config.fp16 or config.bf16):
        config.mixed_precision = "no"  # the recipe's dtype decides, not accelerate's settings
    config._n_gpu = min(
        config.n_gpu, 1
    )  # one process uses one GPU; for several GPUs, a launcher starts several processes
    return config


def padding_multiple(max_length: int, device: torch.device) -> int | None:
    """Return the number of tokens whose multiple a batch is padded to; None for the longest row of the batch.

    On a CPU every new size costs: the matrix library builds a kernel for it, and freed memory of another size is of no
    use to it. A multiple of about 1/16 of the longest row leaves 16 sizes, and adds 1/32 of a row on average.
    A multiple that does not divide `max_length` is not used: padding would go beyond it.
    """
    multiple = max(_SMALLEST_MULTIPLE, 1 << max(0, max_length // _MOST_LENGTHS - 1).bit_length())
    return multiple if device.type == "cpu" and max_length % multiple == 0 else None


def _shared(
    train: Train, checkpoints: Path, precision: Precision, device: torch.device, steps: int, evaluate: bool
) -> dict[str, Any]:
    """Return the arguments that do not depend on the objective."""
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.grad_accum_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": round(train.warmup_ratio * steps),
        "optim": _OPTIMIZERS.get(train.optimizer, train.optimizer),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": train.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if train.save_every else "no",
        "save_steps": train.save_every or 500,
        "eval_strategy": "steps" if evaluate and train.eval_every else "no",
        "eval_steps": train.eval_every or None,
        "seed": train.seed,
        "data_seed": train.seed,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "router_aux_loss_coef": 0.0,
        "report_to": list(train.report_to) or "none",
        "disable_tqdm": False,
        "ddp_find_unused_parameters": False,  # every trained tensor gets a gradient, as the first step's check verifies
        "ddp_broadcast_buffers": False,  # the scales of the 4-bit base are the same in every process
    }
