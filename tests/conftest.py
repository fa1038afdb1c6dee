"""Small real things that many tests use: golden files, a tiny base and an adapter, a data file, verbs run here.

What takes seconds to import is imported where it is used: pytest's first process only hands the tests out to others.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.isolation import isolate

isolate()
gc.disable()  # until all tests are collected: what is imported stays, and each full collection walks through it all

from lola_ft.cli import main

if TYPE_CHECKING:
    import torch

    from lola_ft.model import LolaConfig, LolaForCausalLM

GOLDEN = Path(__file__).parent / "golden"
TINY_TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "one two three four five six seven eight nine ten red green blue Jina langu ni Amina",
]


@pytest.fixture(scope="session", autouse=True)
def float32_where_a_recipe_says_bfloat16() -> Iterator[None]:
    """Compute as on a CPU without bfloat16 units, so that numbers are exact and the same on every machine.

    What computes in bfloat16 is tested by name; processes of their own compute as the machine does.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        yield


@pytest.fixture(scope="session")
def make_config() -> Callable[..., LolaConfig]:
    """Makes the tiny config; keywords change it."""
    from tests.tiny import tiny_config

    return tiny_config


def make_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random tiny base with its tokenizer, in the Hub's layout."""
    import torch

    from lola_ft.model import LolaForCausalLM
    from lola_ft.nano.build import train_tokenizer
    from tests.tiny import tiny_config

    torch.manual_seed(seed)
    LolaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    train_tokenizer(TINY_TEXT, vocab_size=320, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def unflushed_files() -> Iterator[None]:
    """Files are safe from a killed process without it; waiting for the disk takes longer than writing tiny files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two test processes share two cores; tiny tensors gain nothing from threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def undrawn_pictures() -> Iterator[None]:
    """Runs store pictures of one pixel; tests of pictures use `pictures` or `drawing`."""
    from tests.pictures import undrawn

    with undrawn():
        yield


@pytest.fixture
def pictures() -> Iterator[None]:
    """Pictures are drawn as a user gets them."""
    from tests.pictures import drawing

    with drawing():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests cache in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOLA_FT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the authors' own code."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny base; read only."""
    return make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def biased_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with random biases (a fresh model's are zero); read only."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("biased") / "base"
    shutil.copytree(tiny_base, folder)
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in sorted(state):
        if name.endswith(".bias"):
            state[name] = state[name] + 0.1 * torch.randn(state[name].shape, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca_rows(count: int) -> list[dict[str, Any]]:
    """Rows that a tiny model can learn: an instruction and the number's name."""
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {"instruction": f"Name {i % 10}", "input": "", "output": names[i % 10], "language": ("en", "sw")[i % 2]}
        for i in range(count)
    ]


def pytest_collection_finish() -> None:
    """Keep the libraries' objects out of the garbage collector's way: each full collection walks through them all."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty Alpaca rows in two languages; read only."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", alpaca_rows(80))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on every group with random numbers, with tokenizer and template; its base is a local folder."""
    import torch

    from lola_ft.adapters import AdapterSettings, add_adapter, save_adapter
    from lola_ft.quantization import load_base

    torch.manual_seed(1)
    base = load_base(tiny_base, quantization=None, dtype="float32", device="cpu", quiet=True)
    settings = AdapterSettings(attention_rank=4, mlp_rank=8, expert_rank=4, alpha=8.0, dropout=0.0)
    model = add_adapter(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)

    def companions(folder: Path) -> None:
        for file in tiny_base.glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
        (folder / "prompt_template.jinja").write_text("{{ prompt }}\n")

    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "adapter", also=companions)


def assert_says(message: str, expected: str) -> None:
    """Check that a message has all parts of what is expected, in this order.

    Args:
        expected: The key, the place, the values, the remedy; `…` between them stands for wording that may change.
    """
    start = 0
    for part in (part.strip() for part in expected.split("…")):
        found = message.find(part, start)
        assert found >= 0, f"{part!r} is missing, or comes too early, in: {message}"
        start = found + len(part)


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `lola-ft …` in this process."""

    def run(*arguments: str) -> Outcome:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., LolaConfig]) -> Callable[..., LolaForCausalLM]:
    """Makes a random model in evaluation mode: four layers, hidden 64, no dropout; keywords change its config."""
    import torch

    from lola_ft.model import LolaForCausalLM

    def make(seed: int = 0, **changes: Any) -> LolaForCausalLM:
        torch.manual_seed(seed)
        return LolaForCausalLM(make_config(**{"n_positions": 64} | changes)).eval()

    return make


@pytest.fixture(scope="session")
def golden_base() -> Path:
    """The authors' checkpoint; read only."""
    return GOLDEN / "base"


class Folder:
    """A copy of the authors' checkpoint whose config and tensors can be rewritten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.weights_file = path / "model.safetensors"
        self.index_file = path / "model.safetensors.index.json"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.weights_file)

    def set_config(self, **changes: Any) -> None:
        config = json.loads(self.config_file.read_text())
        self.config_file.write_text(json.dumps(config | changes))

    def set_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file(tensors, self.weights_file, metadata={"format": "pt"})

    def cast(self, dtype: torch.dtype) -> None:
        self.set_tensors({name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def shard(self, count: int = 3) -> list[Path]:
        """Deal the tensors out to shards with an index; returns the shards."""
        from safetensors.torch import save_file

        tensors, weight_map, files = self.tensors, {}, []
        for i in range(count):
            files.append(self.path / f"model-{i + 1:05}-of-{count:05}.safetensors")
            part = {name: tensors[name] for name in list(tensors)[i::count]}
            save_file(part, files[-1], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, files[-1].name)
        self.index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        self.weights_file.unlink()
        return files


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy of the authors' checkpoint, to rewrite."""
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    return Folder(tmp_path / "base")
