"""Building a nano base: corpus, tokenizer, pre-training, and a folder in the Hub's layout, which later runs reuse.

The tokenizer is byte-level BPE like LOLA's, with the same special ids, so it can encode any text in any script.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lola_ft.console import Console
from lola_ft.errors import UserError
from lola_ft.families import LOLA, Architecture, Family, find_family
from lola_ft.files import replace_folder
from lola_ft.nano.corpus import build_corpus, build_documents, load_split
from lola_ft.nano.declaration import HELD_OUT_ARTICLES, load_declarations
from lola_ft.nano.pretrain import pack, pretrain
from lola_ft.nano.settings import NanoSettings, nano_architecture
from lola_ft.progress_bars import without_progress_bars
from lola_ft.quantization import load_base

RECORD_FILE = "nano.json"
NANO_FOLDER = ".cache/nano"
# A token's id is its index here, as in LOLA's tokenizer: bos 0, pad 1, end of text 5.
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]


def build_nano(out: str | Path | None = None, settings: NanoSettings | None = None, family: str | None = None) -> Path:
    """Build a nano base, or keep an existing one with the same settings; raises UserError for other folders.

    Args:
        out: The folder; by default `.cache/nano` for LOLA, `.cache/nano-MODEL_TYPE` for other families.
        family: The model type of a base family; None means LOLA.

    Returns:
        The folder.
    """
    settings = settings or NanoSettings()
    known = find_family(family or LOLA.model_type, "--family")
    architecture = nano_architecture(known, settings)
    folder = Path(out or (NANO_FOLDER if known is LOLA else f"{NANO_FOLDER}-{known.model_type}"))
    console, name = Console(), f"The nano base ({known.title})"
    key = settings.key(architecture)  # computed before transformers changes the config
    if _is_kept(folder, known, key):
        console.print(f"{name} is already in {folder} (same settings and versions).")
        return folder
    began = time.perf_counter()
    split, declarations = load_split(), load_declarations().values()
    seed = settings.pretrain.seed
    names = build_documents(split.train, settings.passes, settings.english_passes, seed, split.held_out)
    documents = build_corpus(names, declarations, settings.declaration_passes, settings.names_share, seed)
    tokenizer = train_tokenizer(documents, settings.vocab_size, settings.n_positions)
    rows_NS = pack(documents, tokenizer, settings.pretrain.row_length)
    languages = len({term.language for term in split.train})
    console.print(
        f"{len(split.train):,} names in {languages} languages ({len(split.held_out):,} are held out), the declaration "
        f"of human rights in {len(declarations)} languages and scripts (articles {HELD_OUT_ARTICLES[0]} to "
        f"{HELD_OUT_ARTICLES[-1]} are held out): {rows_NS.numel():,} tokens. {architecture.total_parameters:,} "
        f"parameters, {architecture.active_parameters:,} of them active per token."
    )
    model = new_model(architecture, settings)
    loss = pretrain(model, rows_NS, tokenizer.eos_token_id, settings.pretrain)
    seconds = time.perf_counter() - began
    record = {
        "family": known.model_type,
        "key": key,
        "settings": asdict(settings),
        "parameters": {"total": architecture.total_parameters, "active": architecture.active_parameters},
        "loss": loss,
        "seconds": round(seconds, 1),
    }
    with replace_folder(folder) as partial, without_progress_bars():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"{name} is in {folder}: loss {loss:.2f} nats per token after {seconds:.0f} s.")
    return folder


def _is_kept(folder: Path, family: Family, key: str) -> bool:
    """Tell whether the folder already holds this nano base.

    Raises:
        UserError: The folder holds something that must not be replaced.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        found, its_key = record.get("family", LOLA.model_type), record["key"]  # earlier versions built only LOLA
    except (OSError, ValueError, KeyError, AttributeError):
        if folder.exists() and any(folder.iterdir()) and not (folder / RECORD_FILE).is_file():
            raise UserError(f"{folder}: is not empty and holds no nano base. Choose another folder.") from None
        return False
    if found != family.model_type:
        raise UserError(f"{folder}: holds the nano base of {found}, not of {family.model_type}. Choose another folder.")
    return its_key == key


def new_model(architecture: Architecture, settings: NanoSettings) -> Any:
    """Return a model with random weights, drawn by transformers except for the embeddings; all weights are trained.

    It is loaded from a checkpoint, so that it has the same class as in every other verb.
    """
    torch.manual_seed(settings.pretrain.seed)
    stock = AutoModelForCausalLM.from_config(architecture.config)
    torch.nn.init.normal_(stock.get_input_embeddings().weight, std=settings.embedding_std)
    with TemporaryDirectory() as folder, without_progress_bars():
        stock.save_pretrained(folder)
        return load_base(folder, quantization=None, dtype="float32", device="cpu", quiet=True)


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer for a model of `max_length` positions; equal documents in equal order give the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        eos_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
