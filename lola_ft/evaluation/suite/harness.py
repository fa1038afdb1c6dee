"""The interface to EleutherAI's lm-evaluation-harness (optional extra `harness`)."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from lola_ft.environment import version_of
from lola_ft.errors import UserError
from lola_ft.evaluation.suite.other_model import NO_PERPLEXITY, OtherModel
from lola_ft.open_model import OpenModel


def require_harness() -> str:
    """Return the harness's version; raises UserError if it is not installed."""
    version = version_of("lm_eval")
    if version is None:
        raise UserError(
            "--suite runs EleutherAI's lm-evaluation-harness, which is not installed. Install it: "
            "pip install 'lola-ft[harness]' (or, in a checkout, -c constraints.txt -e '.[harness]')."
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return version


@cache
def task_manager(include_path: str | None = None, defaults: bool = True) -> Any:
    """Return the harness's register of tasks. Reading all tasks of the harness takes half a minute."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: no such folder. Give the folder with the tasks' YAML files.")
    return TaskManager(include_path=include_path, include_defaults=defaults)


def manager_for(tasks: list[str], include_path: str | None) -> Any:
    """Return a task manager of the user's folder if all tasks are in it, else one that also has the harness's tasks."""
    if include_path is not None:
        own = task_manager(include_path, False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return task_manager(include_path, True)


def harness_model(opened: OpenModel, batch_size: int) -> Any:
    """Wrap an open model (dense or 4 bit, with or without adapter) for the harness.

    Nothing is put before a text, except the end-of-text token for an empty context, as between pre-training documents.
    """
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=opened.causal,
        tokenizer=opened.tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=opened.sizes.positions,
        add_bos_token=False,
        prefix_token_id=opened.tokenizer.eos_token_id,
    )


def harness_of_other(other: OtherModel, batch_size: int) -> Any:
    """Load a model of another architecture and wrap it for the harness.

    The window is the one in the config, else the harness's default. The harness decides about special tokens.
    """
    from lm_eval.models.huggingface import HFLM

    class EncoderDecoder(HFLM):
        """An encoder-decoder that refuses perplexity: the harness would give its encoder a single end-of-text token."""

        def loglikelihood_rolling(self, *_: Any, **_options: Any) -> Any:
            raise UserError(NO_PERPLEXITY)

    model, tokenizer = other.load()
    kind, backend = (EncoderDecoder, "seq2seq") if other.encodes else (HFLM, "causal")
    return kind(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)


def run_task(model: Any, task: str, manager: Any, limit: int | None, shots: int) -> dict[str, Any]:
    """Run one task; returns its metrics by the harness's names, and the number of documents."""
    from lm_eval.evaluator import simple_evaluate

    found = simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    metrics = {
        key: value
        for key, value in found["results"][task].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key
    }
    documents = found["n-samples"][task]["effective"]
    return {"metrics": metrics, "documents": documents, "version": found["versions"].get(task)}
