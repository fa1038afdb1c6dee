"""The peak of a backward pass on a CPU, saved tensors and work space together, against what the allocator counts."""

from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from lola_ft.adapters import AdapterSettings
from lola_ft.planning.saved_for_backward import activations
from lola_ft.planning.workspace import backward_work
from tests.grids import slow_but
from tests.planning.conftest import Batch, adapted, checkpointed, job_of, make, make_batch

# Work space is an estimate, and gradients of factors come and go.
TOLERANCE = 0.10
BASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_embd": 128}),
    ("gpt2", {"n_embd": 128, "activation_function": "gelu"}),
    ("bloom", {"hidden_size": 128}),
]


def peak_of_backward(model: Any, inputs: dict[str, Any]) -> int:
    """Bytes that are allocated from the forward pass on, when they are the most on the way back."""
    model(**inputs, use_cache=False, skip_logits=True).loss.backward()  # makes the gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(**inputs, use_cache=False, skip_logits=True).loss
        with record_function("way back"):
            loss.backward()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "way back")
    held = peak = 0
    for event in events:
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held) if event.start_ns() > began else 0
    return peak


@pytest.mark.parametrize("checkpointing", slow_but([True], [False, True]))
@pytest.mark.parametrize(("family", "sizes"), BASES)
def test_the_peak_of_the_backward_pass_is_as_planned(
    family: str, sizes: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    base, settings = make(tmp_path / "base", family, **sizes), AdapterSettings(attention_rank=4, mlp_rank=8)
    batch = Batch(4, 128, packing=False, checkpointing=checkpointing)
    model = adapted(base, None, "float32", settings)
    if checkpointing:
        checkpointed(model)
    job = job_of(model.config, settings, None, "float32", batch)
    kept = activations(job)
    planned = kept.saved + kept.held + kept.recomputed + backward_work(job)
    assert planned == pytest.approx(peak_of_backward(model, make_batch(batch)), rel=TOLERANCE)
