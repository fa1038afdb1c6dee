"""DPO and KTO with trained rows of special tokens: TRL's fused head scores them beside the frozen matrix."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from lola_ft.training.trainers.trained_head import score_trained_rows
from tests.adapters.test_token_rows import IDS, LABELS, bases, with_rows
from tests.conftest import Outcome
from tests.grids import slow_but
from tests.training.trainers.test_preference import metrics
from tests.training.trainers.test_reference import STARTS, Preference

__all__ = ["bases"]
TOKENS = ["<|ask|>", "<|say|>"]
SCORES = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.mark.parametrize("family", slow_but(["olmoe"], ["lola", "olmoe"]))
def test_scores_and_gradients_are_those_of_whole_logits(bases: dict[str, Path], family: str) -> None:
    """With tied embeddings (LOLA) and a head of its own (OLMoE); no gradient of the whole matrix is formed."""
    model = with_rows(bases[family])
    add_fused_lm_head(model.get_base_model(), outputs=SCORES)
    score_trained_rows(model)
    scores = model(LABELS, labels=LABELS, fused_lm_head=True)
    scores.log_probs.mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    all_log_probs = model(LABELS).logits[:, :-1].log_softmax(-1)
    log_probs = all_log_probs.gather(-1, LABELS[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.log_probs, log_probs)
    torch.testing.assert_close(scores.loss, -log_probs.mean())
    log_probs.mean().backward()
    assert sum("trainable_tokens_delta" in name for name in found) == (1 if family == "lola" else 2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Sums over the vocabulary in another order: a few float32 roundings of gradients around 1.
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-5)
        else:
            assert parameter.grad is None


def test_without_its_adapter_the_head_is_the_bases(bases: dict[str, Path]) -> None:
    model = with_rows(bases["olmoe"]).eval()
    add_fused_lm_head(model.get_base_model(), outputs=SCORES)
    of_trl = model.get_base_model().forward
    score_trained_rows(model)
    assert model.get_base_model().forward is not of_trl
    with torch.no_grad(), model.disable_adapter():
        found = model(LABELS, labels=LABELS, fused_lm_head=True).log_probs
        log_probs = model(LABELS).logits[:, :-1].log_softmax(-1).gather(-1, LABELS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, log_probs)
    assert set(IDS) <= set(LABELS.flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "way"),
    [(objective, way) for objective in STARTS for way in ("before", "beside")],
)
def test_preferences_move_the_rows_of_special_tokens(
    objective: str, way: str, tmp_path: Path, tiny_base: Path, rows_file: Path, verb: Callable[..., Outcome]
) -> None:
    """A stage with answers that brings the tokens, then preferences on top: the first loss, and rows that move."""
    preference = Preference(tmp_path, tiny_base, rows_file, verb)
    first = preference.first(data={"special_tokens": TOKENS})
    path = preference.recipe(objective, first, max_steps=3, learning_rate=0.02, reference_pass=way)
    recipe = YAML().load(path)
    marked = tmp_path / "marked.jsonl"
    rows = [json.loads(line) for line in (tmp_path / f"{objective}.jsonl").read_text().splitlines()]
    lines = (json.dumps(row | {"prompt": f"{TOKENS[0]}{row['prompt']}{TOKENS[1]}"}) for row in rows)
    marked.write_text("".join(f"{line}\n" for line in lines))
    recipe["data"]["sources"][0]["path"] = str(marked)
    YAML().dump(recipe, path)
    preference.losses(path)
    lines_of: list[dict[str, Any]] = [line for line in metrics(tmp_path / objective) if "loss" in line]
    assert lines_of[0]["loss"] == pytest.approx(STARTS[objective], abs=1e-6)
    assert lines_of[-1]["loss"] != lines_of[0]["loss"]
    assert all(math.isfinite(line["loss"]) for line in lines_of)
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, tmp_path / objective))
    [name] = [name for name in after if "trainable_tokens_delta" in name]
    assert not torch.equal(before[name], after[name])
