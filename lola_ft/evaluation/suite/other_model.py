"""Models of other architectures for suites: all that transformers can load by itself, only from safetensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lola_ft.checkpoints.folder import CONFIG_FILE, read_json, resolve_folder, weight_files
from lola_ft.checkpoints.tokenizer import read_tokenizer
from lola_ft.errors import CheckpointError, first_line
from lola_ft.families import FAMILIES
from lola_ft.files import sha256_of
from lola_ft.kernels.precision import has_bfloat16
from lola_ft.progress_bars import without_progress_bars
from lola_ft.quantization.load import default_device
from lola_ft.subject import is_adapted

NO_PERPLEXITY = (
    "perplexity of texts is not defined for an encoder-decoder: its decoder predicts an answer to the encoder's text, "
    "not each token of a text from the tokens before it. Leave this task out for this model."
)


@dataclass(frozen=True)
class OtherModel:
    """A checkpoint of an architecture that lola_ft has no family for, found but not loaded.

    Attributes:
        name: The name as the user wrote it.
        model_type: transformers' name of the architecture, such as "mt5".
        encodes: True for an encoder-decoder.
    """

    name: str
    folder: Path
    model_type: str
    encodes: bool

    def identity(self) -> dict[str, Any]:
        """Return facts that identify this model: the hash of its weight files, its quantisation and its dtype."""
        return {
            "weights": sha256_of(*weight_files(self.folder)),
            "quantization": "none",
            "dtype": str(_dtype()).removeprefix("torch."),
        }

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer. No code of the checkpoint runs, and no pickle is opened.

        Raises:
            CheckpointError: transformers cannot load the model or its tokenizer.
        """
        weight_files(self.folder)
        tokenizer = read_tokenizer(self.folder)
        auto = AutoModelForSeq2SeqLM if self.encodes else AutoModelForCausalLM
        try:
            with without_progress_bars():
                model = auto.from_pretrained(
                    self.folder, trust_remote_code=False, use_safetensors=True, dtype=_dtype(), device_map=None
                )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise CheckpointError(f"{self.folder}: transformers cannot load it ({first_line(error)}).") from error
        return model.to(default_device()).eval(), tokenizer


def find_other_model(name: str) -> OtherModel | None:
    """Return a model that only transformers has a class for; None for a model of lola_ft's families.

    Raises:
        CheckpointError: The model does not exist, has no safetensors, or is of a type unknown to transformers.
    """
    if is_adapted(Path(name)):
        return None
    folder = resolve_folder(name)
    config = read_json(folder / CONFIG_FILE)
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return None
    encodes = model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if not encodes and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        code = " Its own code (auto_map) is never run." if config.get("auto_map") else ""
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: model_type is '{model_type}', and transformers has no language model of this "
            f"type.{code} Give a causal model or an encoder-decoder that transformers supports."
        )
    weight_files(folder)
    return OtherModel(name, folder, model_type, encodes)


def is_encoder_decoder(name: str) -> bool:
    """Tell whether a local folder holds an encoder-decoder; False if it does not exist or cannot be read."""
    try:
        config = json.loads((Path(name) / CONFIG_FILE).read_text(encoding="utf-8"))
        return config.get("model_type") in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    except (OSError, ValueError, AttributeError):
        return False


def _dtype() -> torch.dtype:
    return torch.bfloat16 if has_bfloat16(default_device()) else torch.float32
