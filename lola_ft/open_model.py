"""Opening a base, a run, an adapter or a merged model, with its tokenizer and template."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lola_ft.adapters import load_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint, open_config
from lola_ft.checkpoints.folder import CHAT_TEMPLATE_FILE, TEMPLATE_FILE, resolve_folder
from lola_ft.checkpoints.tokenizer import load_tokenizer, read_tokenizer
from lola_ft.data.chat_template import ChatTemplate, PromptTemplate
from lola_ft.data.prompt_template import Template
from lola_ft.families import Architecture, Sizes, architecture_of
from lola_ft.kernels.precision import has_bfloat16
from lola_ft.quantization.cache import is_cache
from lola_ft.quantization.load import default_device, known_dtype, load_base, load_checkpoint
from lola_ft.subject import Subject, find_subject, naming_base_of


@dataclass(frozen=True)
class PromptReader:
    """A model's tokenizer, template and positions, known before its weights are loaded.

    Attributes:
        template: See OpenModel.
        positions: Most tokens of prompt and answer together.
    """

    subject: Subject
    tokenizer: PreTrainedTokenizerFast
    template: PromptTemplate | None
    positions: int


def prompt_reader(subject: Subject) -> PromptReader:
    """Read a model's tokenizer, template and number of positions."""
    base = _base_folder(subject)
    tokenizer = read_tokenizer(_tokenizer_folder(subject, base))
    return PromptReader(subject, tokenizer, saved_template(subject), open_config(base)[1].sizes.positions)


@dataclass(frozen=True)
class OpenModel:
    """A model ready for questions, with its tokenizer and prompt template.

    Attributes:
        template: The prompt template or chat template that the model was trained with; None for a base.
        fingerprint: Fingerprint of the base's weights.
    """

    subject: Subject
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    template: PromptTemplate | None
    fingerprint: str

    @property
    def causal(self) -> PreTrainedModel:
        """The language model itself, including the wrappers of an adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def architecture(self) -> Architecture:
        """The base's family and sizes."""
        return architecture_of(self.model.config)

    @property
    def sizes(self) -> Sizes:
        return self.architecture.sizes

    @property
    def quantization(self) -> str:
        """`nf4`, or `none` for an unquantised model."""
        return getattr(self.causal, "quantization", None) or "none"


def open_model(
    path: str | Path,
    base: str | None = None,
    revision: str | None = None,
    quantization: str | None = "auto",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    quiet: bool = True,
    adapter: str | Path | None = None,
) -> OpenModel:
    """Load a base, a run, an adapter (either layout) or a merged model for evaluation.

    Args:
        base: The base of a run or an adapter, if it is not where it was in training.
        quantization: "nf4", "none", or "auto" (as in the run's training, else unquantised).
        dtype: bfloat16 becomes float32 if the machine only emulates bfloat16.
        adapter: A run or an adapter to put on a base.

    Raises:
        UserError: There is nothing to open, or the tokenizer does not belong to the model.
    """
    return open_subject(find_subject(path, base, revision, adapter), quantization, dtype, device, quiet)


def open_subject(
    subject: Subject,
    quantization: str | None = "auto",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    quiet: bool = True,
) -> OpenModel:
    """Load a model that was found already; for the arguments see `open_model`."""
    target = torch.device(device) if device else default_device()
    wanted = _fitting(subject) if quantization == "auto" else quantization
    held = known_dtype(_possible(dtype, target))
    base, offload = _base_folder(subject), _offload(subject, wanted, target)
    if is_cache(base):
        model = load_base(base, wanted, held, target, quiet=quiet, offload=offload)
    else:
        model = load_checkpoint(BaseCheckpoint.open(base), subject.base, wanted, held, target, quiet, offload=offload)
    fingerprint = model.base_fingerprint
    if subject.adapter:
        model = load_adapter(model, subject.adapter)
    tokenizer = load_tokenizer(_tokenizer_folder(subject, base), model.config)
    return OpenModel(subject, model.eval(), tokenizer, saved_template(subject), fingerprint)


def saved_template(subject: Subject) -> PromptTemplate | None:
    """Return the template that a model was trained with, from its prompt template's or chat template's file.

    A base has none, even if its tokenizer has a chat template, because its authors may have trained it differently.
    """
    own, chat = subject.folder / TEMPLATE_FILE, subject.folder / CHAT_TEMPLATE_FILE
    if own.is_file():
        return Template.load(str(own))
    trained = subject.adapter is not None or subject.kind == "merged"
    return ChatTemplate(chat.read_text(encoding="utf-8")) if trained and chat.is_file() else None


def _base_folder(subject: Subject) -> Path:
    """Return the folder with the base's weights: the adapter's base, or the model's own folder."""
    with naming_base_of(subject):
        return subject.folder if subject.adapter is None else resolve_folder(subject.base, subject.revision)


def _tokenizer_folder(subject: Subject, base: Path) -> Path:
    return subject.folder if any(subject.folder.glob("tokenizer*")) else base


def _fitting(subject: Subject) -> str | None:
    """Return the quantisation of the run's training; NF4 if the base is only here in 4 bit."""
    return "nf4" if is_cache(subject.base) else subject.quantization


def _offload(subject: Subject, quantization: str | None, device: torch.device) -> str | None:
    """Return the weights that the run kept in host memory, if that is possible here: on a GPU, in 4 bit. Else None."""
    return subject.offload if device.type == "cuda" and quantization == "nf4" else None


def _possible(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    bfloat16 = dtype in ("bfloat16", torch.bfloat16)
    return torch.float32 if bfloat16 and not has_bfloat16(device) else dtype
