"""A tiny tokenizer with LOLA's special ids, and short ways to write data files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lola_ft.data import Source

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE: bos 0, pad 1, eos 5, as in LOLA's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["one two three four five six seven eight nine ten"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="<|endoftext|>"
    )


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Source]:
    """Write rows to rows.jsonl and give the source that reads them."""

    def write(rows: list[dict[str, Any]], format: str = "alpaca", **keys: Any) -> Source:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return Source(format=format, path=str(path), **keys)

    return write
