"""A base's tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lola_ft.errors import CheckpointError


def load_tokenizer(folder: Path, config: Any) -> PreTrainedTokenizerFast:
    """Load the base's tokenizer, checked against its vocabulary.

    Args:
        config: transformers' config of the base.

    Raises:
        CheckpointError: If there is none, or it has more tokens than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: no tokenizer can be loaded from here ({reason}).") from error
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size}. They do not belong together."
        )
    return tokenizer
