"""A base's tokenizer."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lola_ft.errors import CheckpointError


def load_tokenizer(folder: Path, config: Any, own_rows: Collection[str] = ()) -> PreTrainedTokenizerFast:
    """Load the base's tokenizer, and check it against the base's vocabulary.

    Args:
        config: transformers' config of the base.
        own_rows: Tokens with trained rows, whose ids may be beyond the model's rows.

    Raises:
        CheckpointError: If there is no tokenizer, or it has more tokens than the model.
    """
    tokenizer = read_tokenizer(folder)
    beyond = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size, len(tokenizer))))
    if lacking := [token for token in beyond if token not in own_rows]:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for only "
            f"{config.vocab_size}; {', '.join(map(str, lacking[:5]))} {'has' if len(lacking) == 1 else 'have'} none. "
            "If you added tokens to the base's tokenizer, name them in data.special_tokens, which trains their "
            "embeddings. Otherwise this tokenizer belongs to another model."
        )
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder's tokenizer without comparing it with a model; raises CheckpointError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: no tokenizer can be loaded from here ({reason}).") from error
