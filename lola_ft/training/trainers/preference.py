"""TRL's DPO and KTO on judged answers that are already token ids, compared with a reference model.

The reference is the base without an adapter, or a frozen copy of the adapter that the run continues. Log-probabilities
are computed for a tile of rows at a time (TRL's fused head), so the logits of a whole batch never exist.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from lola_ft.training.trainers.run_trainer import RunTrainer
from lola_ft.training.trainers.trained_head import score_trained_rows


class PreferenceTrainer(RunTrainer):
    """The common part of DPO and KTO: the reference, and rows that are already encoded.

    Attributes:
        reference_columns: Columns in which TRL expects the reference's log-probabilities, if they are computed before
            training.
        reference_seconds: Seconds that computing them took; 0 if they are computed in every step.
    """

    reference_columns: tuple[str, ...]
    reference_seconds = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        assert isinstance(model, PeftModel), "the reference is the model without its adapter, or with another"
        before = list(model.peft_config)
        with _no_copy_of_adapter(model):
            super().__init__(*args, **kwargs)
        assert list(model.peft_config) == before, f"adapters {list(model.peft_config)}"
        score_trained_rows(model)
        for module in model.modules():  # TRL switches off dropout modules, but attention's dropout is a number
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0

    def ordered_rows(self, dataset: Dataset, args: DPOConfig | KTOConfig, name: str) -> Dataset:  # noqa: ARG002
        """Return the rows in the order for training (`name` is `train`) or evaluation."""
        return dataset

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, name: str) -> Dataset:  # noqa: ARG002
        return self.ordered_rows(dataset, args, name)


class DpoTrainer(PreferenceTrainer, DPOTrainer):
    """Raises the probability of chosen answers above that of rejected answers (DPO, arXiv 2305.18290)."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")


class KtoTrainer(PreferenceTrainer, KTOTrainer):
    """Raises the probability of good answers and lowers that of bad answers (KTO, arXiv 2402.01306).

    Each micro batch also pairs its prompts with other answers of the same micro batch, to estimate how far the model
    has moved from the reference. So the order of the rows is drawn once, and is the same in every epoch.
    """

    @property
    def reference_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ref_logps", "ref_KL_logps") if self.calculate_KL else ("ref_logps",)

    def ordered_rows(self, dataset: Dataset, args: DPOConfig | KTOConfig, name: str) -> Dataset:
        rows = dataset.shuffle(seed=args.seed, keep_in_memory=True) if name == "train" else dataset
        return rows.map(
            _with_others_answers,
            batched=True,
            batch_size=args.per_device_train_batch_size,
            keep_in_memory=True,
            load_from_cache_file=False,
        )


def _with_others_answers(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    answers = batch["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]], "label": [bool(label[0]) for label in batch["label"]]}


@contextlib.contextmanager
def _no_copy_of_adapter(model: PeftModel) -> Iterator[None]:
    """Keep TRL from copying the adapter as reference, inside the block.

    TRL 1.16 would add a frozen copy of every adapter, without our LoRA on experts. A fresh adapter changes nothing, so
    the reference is the model without it, which takes no memory; TRL uses that if no adapter is called `ref`. An
    adapter that the run continues has its copy already.
    """

    def get_parameter(name: str) -> Tensor:  # TRL would copy the adapter into `ref`; this makes it copy onto itself
        parameter: Tensor = nn.Module.get_parameter(model, name.replace(".ref.", ".default."))
        return parameter

    model.add_adapter, model.get_parameter = lambda *_: None, get_parameter
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter
