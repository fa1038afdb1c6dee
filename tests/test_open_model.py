"""Bases, runs, adapters and merged models are told apart and opened with their own tokenizer and template."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lola_ft
from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.errors import AdapterError, CheckpointError, UserError
from lola_ft.merging import merge
from lola_ft.open_model import open_model
from lola_ft.subject import find_subject
from tests.tiny import TINY

IDS = torch.tensor([[5, 9, 17, 40]])


@pytest.fixture
def run(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(tiny_adapter, folder / "adapter")
    own = {"model": str(tiny_base), "revision": "main", "quantization": "nf4"}
    (folder / "manifest.json").write_text(json.dumps({"recipe": {"base": own}}))
    return folder


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[operator]


def test_a_run_opens_as_it_was_trained(run: Path, tiny_base: Path) -> None:
    opened = open_model(run)
    assert opened.subject.kind == "run"
    assert opened.subject.quantization == "nf4"
    assert opened.template
    assert opened.template.prompt("Hello") == "Hello"
    by_hand = lola_ft.load_adapter(lola_ft.load_base(tiny_base, "nf4", "float32", quiet=True), run / "adapter")
    assert torch.equal(logits(opened.model), logits(by_hand.eval()))


def test_quantisation_can_be_chosen(run: Path) -> None:
    dense = open_model(run, quantization="none").model
    assert not torch.equal(logits(dense), logits(open_model(run).model))


def test_base_adapter_and_merged_are_told_apart(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", check="none")
    base, merged = open_model(tiny_base), open_model(tmp_path / "merged")
    adapted = open_model(tiny_adapter, base=str(tiny_base))
    assert (base.subject.kind, base.template) == ("base", None)
    assert (merged.subject.kind, adapted.subject.kind) == ("merged", "adapter")
    assert merged.template
    assert adapted.template
    assert merged.template.source == adapted.template.source
    torch.testing.assert_close(logits(merged.model), logits(adapted.model), rtol=1e-4, atol=1e-4)
    assert adapted.fingerprint == base.fingerprint


def test_a_run_without_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("output: here\n")
    with pytest.raises(UserError, match="has no adapter yet"):
        find_subject(tmp_path)


def test_an_adapter_that_names_no_base_is_refused(tiny_adapter: Path) -> None:
    with pytest.raises(AdapterError, match="--base"):
        find_subject(tiny_adapter)


def test_an_adapter_of_the_4_bit_base_alone_is_opened_on_that(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    weights = read_adapter(tiny_adapter).weights(TINY)
    weights.starts_at_rounding_error = True
    adapter = write_adapter(weights, tmp_path / "loftq", "peft")
    assert find_subject(adapter, base=str(tiny_base)).quantization == "nf4"
    assert find_subject(tiny_adapter, base=str(tiny_base)).quantization is None


def test_a_base_takes_no_base(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="--base is for a run or an adapter"):
        find_subject(tiny_base, base="other/base")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        find_subject(str(tmp_path / "nowhere"))


def test_a_damaged_manifest_is_named(run: Path) -> None:
    (run / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        find_subject(run)
