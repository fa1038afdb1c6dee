"""The code of a published card, run word for word against the fake Hub, computes what the folder here does."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lola_ft
from lola_ft.hub.publish import publish
from lola_ft.standalone.export import export

BASE_ID = "tester/base"
IDS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(5))
# Runs each block of code by itself, but a generating one with the model before it, and keeps the logits.
DRIVER = """
import json, sys
import torch
from safetensors.torch import save_file

given = json.load(open(sys.argv[1]))
ids, logits = torch.tensor(given["ids"]), {}
for name, blocks in given["cards"].items():
    for heading, code in blocks.items():
        space = {"model": model} if heading == "Generate" else {}
        exec(compile(code, f"{name}: {heading}", "exec"), space)
        model = space["write"].model if "write" in space else space["model"]
        with torch.no_grad():
            found = model.eval()(ids.to(model.device)).logits
        logits[f"{name} / {heading}"] = found.float().cpu().contiguous()
print("lola_ft" in sys.modules)
save_file(logits, sys.argv[2])
"""
WITHOUT = (
    "With transformers 4.41 or later",
    "As a pipeline",
    "With stock PEFT, without lola_ft",
    "With the authors' code (transformers 4.41 to 4.51)",
)
"""Headings of the code that runs where lola_ft is not."""


def code_blocks(card: str) -> dict[str, str]:
    """The card's Python by its heading."""
    return dict(re.findall(r"^([^\n]+):\n\n```python\n(.*?)```", card, re.MULTILINE | re.DOTALL))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS.to(next(model.parameters()).device)).logits.float().cpu()


Cards = dict[str, dict[str, str]]


@pytest.fixture
def run_cards(hub: Any, tmp_path: Path) -> Callable[[Cards, bool], dict[str, Tensor]]:
    """Run the code of cards in a fresh process that knows the fake Hub alone."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    ours = {"PYTHONPATH": str(Path(lola_ft.__file__).parents[1])}

    def run(cards: Cards, with_lola_ft: bool) -> dict[str, Tensor]:
        (tmp_path / "driver.py").write_text(DRIVER)
        (tmp_path / "given.json").write_text(json.dumps({"ids": IDS.tolist(), "cards": cards}))
        for code in (code for blocks in cards.values() for code in blocks.values()):
            if once := re.match(r"# Once, with lola_ft: lola-ft (.*)\n", code):
                command = [sys.executable, "-m", "lola_ft", *once[1].split()]
                subprocess.run(command, cwd=tmp_path, env=environment | ours, check=True)
        command = [sys.executable, "driver.py", "given.json", "logits.safetensors"]
        found = environment | (ours if with_lola_ft else {})
        result = subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == str(with_lola_ft)
        assert result.stdout.count("Jina langu ni") == sum(
            heading in ("Generate", "As a pipeline") for blocks in cards.values() for heading in blocks
        )
        return load_file(tmp_path / "logits.safetensors")

    return run


@pytest.mark.slow
def test_the_code_of_every_card_loads_what_was_published(
    hub: Any, run: Path, merged: Path, tiny_base: Path, run_cards: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    """The base on the fake Hub has our code beside it; it stands in for the authors', whose module names it has."""
    export(tiny_base, tmp_path / "with-code")
    hub.add(BASE_ID, {file.name: file.read_bytes() for file in (tmp_path / "with-code").iterdir()})
    for name, source, layout in (("one", run, None), ("two", run, "per_expert"), ("three", merged, None)):
        publish(source, f"tester/{name}", layout=layout, base_id=BASE_ID, skip_check=True)
    cards = {
        name: code_blocks(hub.repos[f"tester/{name}"].files["README.md"].decode()) for name in ("one", "two", "three")
    }
    assert {name: list(blocks) for name, blocks in cards.items()} == {
        "one": ["With lola_ft", "With stock PEFT", "Generate"],
        "two": ["With lola_ft", *WITHOUT[2:], "Generate"],
        "three": [*WITHOUT[:2], "With lola_ft", "Generate"],
    }
    without = {
        name: {heading: code for heading, code in blocks.items() if heading in WITHOUT}
        for name, blocks in cards.items()
    }
    with_lola_ft = {
        name: {heading: code for heading, code in blocks.items() if heading not in WITHOUT}
        for name, blocks in cards.items()
    }
    found = run_cards(with_lola_ft, True) | run_cards(without, False)

    in_4_bit = logits(lola_ft.load_adapter(lola_ft.load_base(tiny_base), run / "adapter"))
    assert torch.equal(found["one / With lola_ft"], in_4_bit)
    assert torch.equal(found["two / With lola_ft"], in_4_bit)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    alone = logits(plain)
    stock = logits(PeftModel.from_pretrained(plain, run / "adapter"))
    assert torch.equal(found["one / With stock PEFT"], stock)
    assert (stock - alone).abs().max() > 0.1  # the adapter does something
    merged_logits = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert torch.equal(found["three / With lola_ft"], merged_logits)
    for name in WITHOUT:
        card, expected = ("three", merged_logits) if name in WITHOUT[:2] else ("two", stock)
        # Float32 sums in another order: side paths by expert, or experts one after another.
        torch.testing.assert_close(found[f"{card} / {name}"], expected, atol=1e-5, rtol=1e-4)


def test_the_draft_in_a_run_loads_its_adapter(run: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    space: dict[str, Any] = {}
    exec(code_blocks((run / "README.md").read_text())["With lola_ft"], space)
    expected = lola_ft.load_adapter(lola_ft.load_base(tiny_base), run / "adapter")
    assert torch.equal(logits(space["model"]), logits(expected))


def test_a_base_in_the_cache_is_found_and_named_with_its_commit(hub: Any, adapter: Path, tiny_base: Path) -> None:
    base = hub.add(BASE_ID, {file.name: file.read_bytes() for file in tiny_base.iterdir()})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": BASE_ID}))
    snapshot_download(BASE_ID)
    publish(adapter, "tester/model", layout="per_expert", skip_check=True)  # converting needs the base
    files = hub.repos["tester/model"].files
    assert json.loads(files["adapter_config.json"])["revision"] == base.head
    assert f'load_base("{BASE_ID}", revision="{base.head}"' in files["README.md"].decode()
