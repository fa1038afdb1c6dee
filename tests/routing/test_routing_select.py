"""Selection: the fewest experts that reach the coverage, a file that a recipe trains with, an exact size."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from lola_ft.adapters.on_disk import read_adapter
from lola_ft.adapters.selection import read_selection
from lola_ft.errors import UserError
from lola_ft.recipe import load_recipe
from lola_ft.routing.profile import Profile, save_profile
from lola_ft.routing.relevance import save_choice, select_experts
from lola_ft.training import train
from tests.training.conftest import recipe_dict

Make = Callable[..., Profile]


def test_fewest_experts_by_trying_all_sets(made_profile: Make) -> None:
    torch.manual_seed(0)
    profile = made_profile(["a", "b", "c"], torch.randint(1, 100, (3, 2, 6)))
    for coverage in (0.1, 0.5, 0.8, 0.95, 1.0):
        found = select_experts(profile, ["a", "b"], coverage)
        for layer, counts in enumerate(profile.counts_LME[:2].sum(0)):
            enough = [
                size
                for size in range(1, 7)
                if any(
                    counts[list(ids)].sum() >= coverage * counts.sum() for ids in itertools.combinations(range(6), size)
                )
            ]
            assert len(found.experts[layer]) == min(enough)
            assert counts[found.experts[layer]].sum() >= coverage * counts.sum()


def test_the_choice_for_known_counts_is_the_smallest(made_profile: Make) -> None:
    profile = made_profile(["a", "b"], [[[7, 1, 2, 0], [0, 0, 0, 10]], [[0, 0, 5, 5], [5, 5, 0, 0]]])
    found = select_experts(profile, ["a"], 0.7, rank=2)
    assert found.experts == [[0], [3]]
    assert found.reached == {"a": [0.7, 1.0]}
    assert found.spill_over == {"b": [0.0, 0.0]}
    assert select_experts(profile, ["a"], 0.71).experts == [[0, 2], [3]]
    assert select_experts(profile, ["a"], 1.0).experts == [[0, 1, 2], [3]]
    both = select_experts(profile, ["a", "b"], 0.5)
    assert both.experts == [[0, 2], [3]]  # 7 + 7 of 20; equal ones, the lower number first; 10 of 20
    assert both.spill_over == {}
    assert select_experts(profile, ["a", "b", "a"], 0.5) == both
    assert found.parameters == 2 * (2 * (64 + 128) + 2 * (128 + 64))
    assert found.bytes == 4 * found.parameters


def test_gate_weighs_tokens_with_the_routers_probability(made_profile: Make) -> None:
    profile = made_profile(["a"], [[[6, 4]]])
    gates = torch.tensor([[[6 * 0.3, 4 * 0.9]]]) / 10
    weighed = Profile(**vars(profile) | {"mean_gates_LME": gates})
    assert select_experts(weighed, ["a"], 0.5, by="tokens").experts == [[0]]
    assert select_experts(weighed, ["a"], 0.5, by="gate").experts == [[1]]


def test_random_is_a_control_of_the_same_size(made_profile: Make) -> None:
    torch.manual_seed(0)
    profile = made_profile(["a", "b"], torch.randint(1, 100, (2, 4, 16)))
    wanted = select_experts(profile, ["a"], 0.6)
    drawn = [select_experts(profile, ["a"], 0.6, seed=seed) for seed in (1, 1, 2)]
    assert [len(ids) for ids in drawn[0].experts] == [len(ids) for ids in wanted.experts]
    assert drawn[0] == drawn[1]
    assert drawn[0].experts != drawn[2].experts
    assert drawn[0].bytes == wanted.bytes
    assert sum(drawn[0].reached["a"]) < sum(wanted.reached["a"])


def test_unknown_languages_and_wrong_options_are_refused(made_profile: Make) -> None:
    profile = made_profile(["a", "b"], [[[1, 1]], [[1, 1]]])
    for arguments, message in (
        ((["sw"], 0.8), "no language 'sw'. It has a, b"),
        ((["a"], 0.0), "--coverage 0.0: must be above 0"),
        ((["a"], 1.5), "--coverage 1.5: must be above 0 and at most 1"),
        (([], 0.5), "--languages: is empty"),
        ((["a"], 0.5, "logits"), "--by logits: is unknown; choose one of tokens, gate"),
    ):
        with pytest.raises(UserError, match=message):
            select_experts(profile, *arguments)


def test_a_recipe_trains_only_the_selected_experts(
    profile: Profile, tiny_base: Path, rows_file: Path, tmp_path: Path, verb: Callable[..., Any]
) -> None:
    """From the profile's file to an adapter whose expert tensors take exactly the predicted bytes."""
    stored, file = save_profile(profile, tmp_path / "base.safetensors"), tmp_path / "chosen" / "sw.json"
    options = ["--languages", "sw", "--coverage", "0.5", "--rank", "3", "--out", str(file)]
    empty = verb("routing", "select", str(stored), "--languages", "sw,,en", "--out", str(file))
    assert empty.code == 2
    assert "--languages 'sw,,en': a language is empty" in empty.err
    done = verb("routing", "select", str(stored), *options)
    assert done.code == 0, done.err
    record = json.loads(file.read_text())
    selection = read_selection(str(file))
    assert selection == tuple(map(tuple, record["experts"]))
    assert 0 < sum(map(len, selection)) < 8
    recipe = recipe_dict(tiny_base, rows_file, tmp_path / "run", train={"max_steps": 2})
    recipe["adapter"] = {"attention": {"rank": 2}, "experts": {"rank": 3, "select": str(file)}, "alpha": 8}
    YAML().dump(recipe, tmp_path / "recipe.yaml")
    run = train(load_recipe(tmp_path / "recipe.yaml"))
    entries = read_adapter(run / "adapter").entries
    held = {(int(name.split(".h.")[1].split(".")[0]), name.split(".experts.")[1].split(".")[0]): name
            for name in entries if ".experts." in name}  # fmt: skip
    assert set(held) == {(layer, str(e)) for layer, ids in zip((1, 3), selection, strict=True) for e in ids}
    assert sum(entry.num_bytes for name, entry in entries.items() if ".experts." in name) == record["bytes"]
    assert f"{record['parameters']:,} parameters" in done.out


def test_the_file_is_whole_json(profile: Profile, tmp_path: Path) -> None:
    choice = select_experts(profile, ["sw", "en"], 0.9, by="gate")
    record = json.loads(save_choice(choice, tmp_path / "c.json").read_text())
    assert record["languages"] == ["sw", "en"]
    assert set(record["spill_over"]) == {"de"}
    assert record["base_fingerprint"] == profile.about.base_fingerprint


def test_a_place_that_takes_no_file_is_named(profile: Profile, tmp_path: Path) -> None:
    choice = select_experts(profile, ["sw"], 0.5)
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "c.json", "file is not a folder")):
        with pytest.raises(UserError, match=message):
            save_choice(choice, place)
