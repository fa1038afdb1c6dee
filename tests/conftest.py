"""Small real things that many tests use: the authors' golden files, a tiny base with a tokenizer, a data file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lola_ft  # noqa: F401 (registers the model)
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.nano.tokenizer import train_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TINY_TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "one two three four five six seven eight nine ten red green blue Jina langu ni Amina",
]


def tiny_config(**changes: Any) -> LolaConfig:
    """Four layers, four experts, hidden 64, without dropout."""
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_inner": 128,
        "num_experts": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.1,
    }
    return LolaConfig(**settings | changes)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., LolaConfig]:
    """Makes the tiny config; keywords change it."""
    return tiny_config


def make_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random tiny base with its tokenizer, in the Hub's layout."""
    torch.manual_seed(seed)
    LolaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    train_tokenizer(TINY_TEXT, vocab_size=320, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two test processes share two cores; tiny tensors gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the authors' own code."""
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny base; read only."""
    return make_base(tmp_path_factory.mktemp("tiny") / "base")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty Alpaca rows in two languages; read only."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", alpaca_rows(80))
