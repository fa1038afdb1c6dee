"""The reference computed before the first step or beside the steps: equal losses, the cheaper way, resumed runs."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file

from lola_ft.planning.reference_passes import ReferencePasses, reference_passes
from lola_ft.recipe import load_recipe
from lola_ft.training.checkpointing.resume import find_run
from tests.conftest import Outcome, assert_says
from tests.training.checkpointing.test_resume import run_child
from tests.training.test_processes import TWO, launch
from tests.training.trainers.test_preference import metrics, without_times
from tests.training.trainers.test_reference import STARTS, Preference

FILE = "reference.safetensors"
MANY_EPOCHS = {"max_steps": 6, "eval_every": 2}  # of two micro batches each


@pytest.fixture
def preference(tmp_path: Path, tiny_base: Path, rows_file: Path, verb: Callable[..., Outcome]) -> Preference:
    return Preference(tmp_path, tiny_base, rows_file, verb)


def from_the_base(recipe: Path) -> Path:
    """Let a recipe train a fresh adapter, of which the base is the reference."""
    settings = YAML().load(recipe)
    settings["adapter"] = {"attention": {"rank": 4}}
    YAML().dump(settings, recipe)
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "continued"),
    [("dpo", True), ("kto", True), ("dpo", False), ("kto", False)],
)
def test_both_ways_give_the_same_losses(objective: str, continued: bool, preference: Preference) -> None:
    """In the first epoch to the bit, for a row is in the same micro batch; later, sums of other batches differ."""
    first = preference.first() if continued else Path("none")
    ways = dict[str, list[dict[str, Any]]]()
    for way in ("before", "beside"):
        recipe = preference.recipe(objective, first, way, reference_pass=way, **MANY_EPOCHS)
        if not continued:
            from_the_base(recipe)
        preference.losses(recipe, "data.validation=0.3")
        ways[way] = metrics(preference.folder / way)
    assert ways["before"][0]["loss"] == pytest.approx(STARTS[objective], abs=1e-6)
    assert ways["before"][0]["loss"] == ways["beside"][0]["loss"]
    for key in ("loss", "eval_loss", "rewards/chosen"):
        before, beside = ([line[key] for line in ways[way] if key in line] for way in ("before", "beside"))
        assert before == pytest.approx(beside, rel=1e-4, abs=1e-6)
        assert len(set(before)) > 1
    kept = load_file(preference.folder / "before" / FILE)
    assert {name: tensor.shape[1] for name, tensor in kept.items()} == {"train": 2, "validation": 2}
    assert not any(tensor.isnan().any() for tensor in kept.values())
    assert not (preference.folder / "beside" / FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_in_bfloat16_the_first_loss_is_that_of_no_change(objective: str, preference: Preference) -> None:
    recipe = preference.recipe(objective, preference.first(), max_steps=6, grad_accum_steps=2, reference_pass="before")
    lines = preference.losses(recipe, "base.dtype=bfloat16")
    assert lines[0]["loss"] == pytest.approx(STARTS[objective], abs=1e-6)
    assert lines[0]["rewards/chosen"] == 0


def test_the_cheaper_way_is_chosen() -> None:
    """Memory counts first; without any in question, rows; where both ways read as many, they stay in their batch."""
    assert reference_passes(100, 300, 10, 4) == ReferencePasses(before=110, beside=340, copy_bytes=0)
    assert reference_passes(100, 300, 10, 4).cheaper == "before"
    assert reference_passes(100, 40, 0, 1) == ReferencePasses(before=40, beside=40, copy_bytes=0)
    assert reference_passes(100, 40, 0, 1).cheaper == "beside"
    assert reference_passes(100, 40, 10, 2).cheaper == "before"
    assert reference_passes(100, 40, 0, 1, copy_bytes=7).cheaper == "before"
    assert ReferencePasses(None, None, 0).cheaper is None
    assert ReferencePasses(None, None, 7).cheaper == "before"


@pytest.mark.slow
def test_what_is_chosen_is_said_planned_and_kept(preference: Preference) -> None:
    """A run within one epoch, twice: from an adapter, which would need a copy, and from the base, which would not."""
    first = preference.first()
    recipe = preference.recipe("dpo", first, max_steps=1)
    plan = json.loads(preference.verb("plan", str(recipe), "--json").out)
    copy = plan["reference_pass"]["copy_bytes"]
    assert plan["reference_pass"] == {"chosen": "before", "before": 4, "beside": 4, "copy_bytes": copy}
    assert copy == plan["parts"]["adapter"] > 0
    done = preference.verb("train", str(recipe))
    assert_says(done.out, "The reference is computed before the first step. Before the first step it reads 4 rows")
    run = preference.folder / "dpo"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["reference"] == plan["reference_pass"]
    assert manifest["timings"]["reference_s"] >= 0
    assert load_recipe(run / "recipe.yaml").train.reference_pass == "before"
    assert int(load_file(run / FILE)["train"].isnan().any(dim=1).sum()) == 4  # no more is read than trained on
    base = from_the_base(preference.recipe("dpo", first, "base", max_steps=1))
    said = preference.verb("plan", str(base)).out
    assert_says(said, "The reference is computed beside the steps. Before the first step it reads 4 rows")
    unread = preference.verb("plan", str(recipe), "--no-data").out
    assert_says(unread, "The reference is computed before the first step. Before the first step it reads each row once")


@pytest.mark.slow
def test_a_longer_run_computes_what_it_lacks(preference: Preference) -> None:
    """The longer run equals one that was long from the start, bit for bit."""
    first = preference.first()
    settings: dict[str, Any] = {"scheduler": "constant", "warmup_ratio": 0.0}
    preference.losses(preference.recipe("dpo", first, "long", max_steps=5, **settings))
    short = preference.recipe("dpo", first, "short", max_steps=1, **settings)
    preference.losses(short)
    longer = preference.verb("train", str(short), "train.max_steps=5", "--resume", "--allow-changed", "train.max_steps")
    assert_says(longer.out, "The reference has read 4 rows")
    kept, weights = ([preference.folder / run / name for run in ("long", "short")] for name in (FILE, ADAPTER))
    assert_same(*kept)
    assert weights[0].read_bytes() == weights[1].read_bytes()


ADAPTER = "adapter/adapter_model.safetensors"


def assert_same(one: Path, other: Path) -> None:
    """The same tensors; what is kept beside them has the time that computing them took."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "whole"])
def test_a_killed_run_resumes_to_the_same_bits(damage: str, preference: Preference) -> None:
    """With the file it has written, and without it: then the reference is computed again, where the run started."""
    first = preference.first()
    whole, cut = (preference.recipe("dpo", first, name, max_steps=4, save_every=2) for name in ("whole", "cut"))
    assert run_child(whole).code == 0
    assert run_child(cut, moment="logged", step=3).code == -signal.SIGKILL
    file = preference.folder / "cut" / FILE
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage != "whole":
        file.write_bytes(content[:-9] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    shutil.rmtree(first)
    resumed = run_child(cut, "--resume")
    assert resumed.code == 0, resumed.out
    assert ("is damaged" in resumed.out) == (damage in ("cut", "changed"))
    assert ("The reference has read" in resumed.out) == (damage != "whole")
    runs = [preference.folder / name for name in ("whole", "cut")]
    assert_same(runs[0] / FILE, runs[1] / FILE)
    assert (runs[0] / ADAPTER).read_bytes() == (runs[1] / ADAPTER).read_bytes()
    assert without_times(runs[0]) == without_times(runs[1])


@pytest.mark.slow
def test_other_rows_are_computed_again(preference: Preference) -> None:
    recipe = preference.recipe("dpo", preference.first(), max_steps=2, save_every=1)
    preference.losses(recipe)
    changed = preference.verb(
        *("train", str(recipe), "train.max_steps=3", "data.max_length=40", "data.template=plain", "--resume"),
        *("--allow-changed", "train.max_steps", "--allow-changed", "data"),
    )
    assert changed.code == 0, changed.err
    assert_says(changed.out, f"{FILE} belongs to other inputs (train); the reference is computed again")
    assert_says(changed.out, "The reference has read 8 rows")


def test_a_run_of_an_earlier_version_goes_on_beside_the_steps(preference: Preference) -> None:
    """Its recipe has no such key, and its steps were computed so."""
    recipe = preference.recipe("dpo", Path("anything"))
    (preference.folder / "dpo").mkdir()
    shutil.copy(recipe, preference.folder / "dpo" / "recipe.yaml")
    earlier = find_run(preference.folder / "dpo", load_recipe(recipe))
    assert earlier is not None
    assert earlier.recipe.train.reference_pass == "beside"


@pytest.mark.slow
def test_the_log_probabilities_are_those_of_the_start(preference: Preference) -> None:
    """The first loss of a run whose reference is the base is not that of no change, in both ways alike."""
    first = preference.first()
    lines = [
        preference.losses(preference.recipe("dpo", first, way, reference="base", reference_pass=way, max_steps=1))[0]
        for way in ("before", "beside")
    ]
    assert lines[0]["loss"] == lines[1]["loss"]
    assert abs(lines[0]["loss"] - math.log(2)) > 0.001


@pytest.mark.slow
def test_two_processes_compute_each_their_own_rows(preference: Preference) -> None:
    """Each needs the rows of its own micro batches; all get all, and one writes."""
    first = preference.first()
    ways = dict[str, list[dict[str, Any]]]()
    for way in ("before", "beside"):
        recipe = preference.recipe("dpo", first, way, reference_pass=way, max_steps=4, micro_batch_size=2)
        done = launch(TWO, recipe, "data.validation=0.3")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("The reference has read") == (way == "before")
        ways[way] = metrics(preference.folder / way)
    assert ways["before"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    before, beside = ([line["loss"] for line in ways[way] if "loss" in line] for way in ("before", "beside"))
    assert before == pytest.approx(beside, rel=1e-4)
    assert not any(tensor.isnan().any() for tensor in load_file(preference.folder / "before" / FILE).values())
