"""Tiny random bases of other families than LOLA, with tokenizers, adapters and recipes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from lola_ft.adapters import AdapterSettings, add_adapter, save_adapter
from lola_ft.nano.build import train_tokenizer
from lola_ft.quantization import load_base
from tests.families.moe import KINDS, SLOW_KINDS, make_moe

TEXT = ["Below is an instruction that describes a task. Write a response that completes the request.", "one two three"]


def make_dense(folder: Path, kind: str, **changes: Any) -> Path:
    """Write a random two-layer model. Biases are random too, because a new model's are zero."""
    torch.manual_seed(3)
    tokens = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 1, "initializer_range": 0.1}
    if kind == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        model: Any = GPT2LMHeadModel(GPT2Config(**sizes | tokens | quiet | changes))
    else:
        model = BloomForCausalLM(BloomConfig(**{"hidden_size": 64, "n_layer": 2, "n_head": 4} | tokens | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(folder)
    train_tokenizer(TEXT, vocab_size=320, max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny dense bases by family; read only."""
    root = tmp_path_factory.mktemp("dense")
    return {kind: make_dense(root / kind, kind) for kind in ("gpt2", "bloom")}


def write_recipe(path: Path, base: Path, rows: Path, **changes: Any) -> Path:
    """Write a quick recipe. `changes` are merged into its sections."""
    recipe: dict[str, Any] = {
        "base": {"model": str(base), "dtype": "float32"},
        "adapter": {"attention": {"rank": 4}, "mlp": {"rank": 8, "alpha": 4}, "alpha": 8, "dropout": 0.0},
        "data": {
            "sources": [{"path": str(rows), "format": "alpaca", "language_column": "language"}],
            "max_length": 128,
            "validation": 0.2,
        },
        "train": {
            "max_steps": 12,
            "micro_batch_size": 4,
            "grad_accum_steps": 1,
            "learning_rate": 0.01,
            "save_every": 6,
        },
        "output": str(path.parent / "run"),
    }
    for section, keys in changes.items():
        recipe[section] = recipe.get(section, {}) | keys if isinstance(keys, dict) else keys
    YAML().dump(recipe, path)
    return path


@pytest.fixture
def dense_recipe(tmp_path: Path, dense_bases: dict[str, Path], rows_file: Path) -> Callable[..., Path]:
    """Write a recipe for a family, with `tmp_path/run` as the run's folder."""

    def write(kind: str = "gpt2", **changes: Any) -> Path:
        return write_recipe(tmp_path / "recipe.yaml", dense_bases[kind], rows_file, **changes)

    return write


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW_KINDS` as slow."""
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("kind") in SLOW_KINDS:
            item.add_marker(pytest.mark.slow)


class _Made(dict[str, Path]):
    """Folders by model type, made at the first use."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = self._make(kind)
        return self[kind]


@pytest.fixture(scope="session")
def moe_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny mixtures of experts by model type; read only."""
    root = tmp_path_factory.mktemp("moe")
    return _Made(lambda kind: make_moe(root / kind, kind))


@pytest.fixture(scope="session")
def moe_adapters(moe_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters on all groups of these bases, in the layout `peft`, by model type; read only."""
    root = tmp_path_factory.mktemp("moe-adapters")
    return _Made(lambda kind: random_adapter(moe_bases[kind], kind, root / kind))


def random_adapter(base: Path, kind: str, folder: Path, layout: str = "peft", **settings: Any) -> Path:
    """Write an adapter with different ranks on all groups of a kind. B is random too, so that it has an effect."""
    model = load_base(base, None, "float32", "cpu", quiet=True)
    names = {"attention": "attention_rank", "mlp": "mlp_rank", "shared_experts": "shared_rank"}
    names |= {"experts": "expert_rank", "router": "router_rank"}
    ranks = {names[group]: rank for rank, group in enumerate(KINDS[kind].groups, start=2)}
    if settings.get("tune_router"):
        ranks.pop("router_rank")
    adapted = add_adapter(model, AdapterSettings(**ranks | {"alpha": 8.0} | settings))
    torch.manual_seed(4)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return save_adapter(adapted, folder, layout)
