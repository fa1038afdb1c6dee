"""Building the nano base: corpus, tokenizer, pre-training, one folder in the Hub's layout; kept for the next time.

The tokenizer is byte-level BPE like LOLA's own, with the same special ids: any text survives it, whatever its script.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lola_ft.console import Console
from lola_ft.errors import UserError
from lola_ft.files import replace_folder
from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.nano.corpus import build_documents, load_split
from lola_ft.nano.pretrain import PretrainSettings, pack, pretrain

RECORD_FILE = "nano.json"
# Id = place in the list, as in LOLA's tokenizer: bos 0, pad 1, end of text 5.
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]


@dataclass(frozen=True)
class NanoSettings:
    """Everything that decides the nano base: LOLA's architecture at a size that two cores pre-train in two minutes.

    Attributes:
        embedding_std: Spread of the embeddings at the start. Logits reach about `embedding_std * n_embd`, 32 here and
            41 in LOLA (0.02 * 2048). With LOLA's own 0.02 they reached 2.6, and an adapter, which does not
            change the embeddings, could not give any answer much probability.
        passes, english_passes: Over all terms, each time in other lists.
    """

    n_embd: int = 128
    n_head: int = 2
    n_inner: int = 512
    n_layer: int = 2
    num_experts: int = 16
    n_positions: int = 512
    initializer_range: float = 0.05
    embedding_std: float = 0.25
    vocab_size: int = 6144
    passes: int = 1
    english_passes: int = 15
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)

    def key(self) -> str:
        """Return a hash of the settings and library versions; a built folder with the same key is used again."""
        record = asdict(self) | {name: version(name) for name in ("babel", "tokenizers", "torch")}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def build_nano(out: str | Path = ".cache/nano", settings: NanoSettings | None = None) -> Path:
    """Build the nano base in `out`, or keep the one there if the settings are the same; anything else is refused."""
    settings = settings or NanoSettings()
    folder, console = Path(out), Console()
    if folder.exists() and not (folder / RECORD_FILE).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not a nano base and not empty. Choose another folder.")
    if _key_of(folder) == settings.key():
        console.print(f"The nano base is in {folder} already (same settings and versions).")
        return folder
    began = time.perf_counter()
    split = load_split()
    documents = build_documents(
        split.train, settings.passes, settings.english_passes, settings.pretrain.seed, split.held_out
    )
    tokenizer = train_tokenizer(documents, settings.vocab_size, settings.n_positions)
    rows_NS = pack(documents, tokenizer, settings.pretrain.row_length)
    model = _new_model(settings)
    languages = len({term.language for term in split.train})
    console.print(
        f"{len(split.train):,} names in {languages} languages, {rows_NS.numel():,} tokens; "
        f"{len(split.held_out):,} names are held out. {sum(p.numel() for p in model.parameters()):,} parameters."
    )
    loss = pretrain(model, rows_NS, tokenizer.eos_token_id, settings.pretrain)
    seconds = time.perf_counter() - began
    record = {"key": settings.key(), "settings": asdict(settings), "loss": loss, "seconds": round(seconds, 1)}
    with replace_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"The nano base is in {folder}: loss {loss:.2f} nats a token after {seconds:.0f} s.")
    return folder


def _key_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError):
        return None


def _new_model(settings: NanoSettings) -> LolaForCausalLM:
    sizes = ("vocab_size", "n_positions", "n_embd", "n_head", "n_inner", "n_layer", "num_experts", "initializer_range")
    config: dict[str, Any] = {name: getattr(settings, name) for name in sizes}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config |= {"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 1}
    torch.manual_seed(settings.pretrain.seed)
    model = LolaForCausalLM(LolaConfig(**config))
    torch.nn.init.normal_(model.transformer.wte.weight, std=settings.embedding_std)
    return model


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer for a model of `max_length` positions; the same documents in their order give the same ids."""
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
