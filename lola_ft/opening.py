"""Opening what a user points at: a base, a run, an adapter or a merged model, with its tokenizer and template.

The base may be of any family.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lola_ft.adapters import load_adapter
from lola_ft.adapters.files import CONFIG_FILE, read_adapter
from lola_ft.checkpoints.folder import TEMPLATE_FILE, resolve_folder
from lola_ft.checkpoints.tokenizer import load_tokenizer
from lola_ft.data.prompt_template import Template
from lola_ft.errors import AdapterError, UserError
from lola_ft.families import Architecture, Sizes, architecture_of
from lola_ft.file_names import MANIFEST_FILE, MERGE_REPORT_FILE, RECIPE_FILE
from lola_ft.kernels.precision import has_bfloat16
from lola_ft.quantization.cache import is_cache
from lola_ft.quantization.load import default_device, load_base


@dataclass(frozen=True)
class Subject:
    """What a user pointed at, found but not loaded.

    Attributes:
        name: As the user wrote it; what a table calls it.
        folder: Where its own files are: the adapter's folder of a run or an adapter, the model's else.
        base: Folder or Hub id of the weights to load first; the folder itself of a base or a merged model.
        quantization: What a run trained on ("nf4" or None), or what an adapter needs; None where nothing says it.
    """

    name: str
    kind: Literal["base", "run", "adapter", "merged"]
    folder: Path
    base: str
    revision: str | None
    quantization: str | None

    @property
    def adapter(self) -> Path | None:
        """The adapter's folder, if there is one."""
        return self.folder if self.kind in ("run", "adapter") else None


@dataclass(frozen=True)
class OpenModel:
    """A model ready to be asked, and how to talk to it.

    Attributes:
        template: The prompt template that training saved beside it; None of a base.
        fingerprint: Of the base's weights.
    """

    subject: Subject
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    template: Template | None
    fingerprint: str

    @property
    def causal(self) -> PreTrainedModel:
        """The language model itself, with an adapter's wrappers inside it where there is one."""
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
        """`nf4`, or `none` of a dense model."""
        return getattr(self.causal, "quantization", None) or "none"


def find_subject(
    path: str | Path, base: str | None = None, revision: str | None = None, adapter: str | Path | None = None
) -> Subject:
    """Tell what a path or a Hub id is.

    Args:
        base: The base to use instead of the one that a run or an adapter names.
        adapter: A run or an adapter to put on `path`, which is then a base or a merged model.

    Raises:
        UserError: No such folder, a run that did not end, or an adapter whose base nothing names.
        AdapterError: A damaged adapter.
    """
    given, name = Path(path), str(path)
    if adapter is not None:
        return _with_adapter(given, name, base, revision, adapter)
    if (given / MANIFEST_FILE).is_file() or (given / RECIPE_FILE).is_file():
        return _run(given, name, base, revision)
    if (given / CONFIG_FILE).is_file():
        stored = read_adapter(given)
        config = stored.config
        own = base or config.get("base_model_name_or_path")
        if not own:
            raise AdapterError(f"{given}: does not say which base it belongs to. Give it with --base.")
        quantization = "nf4" if stored.starts_at_rounding_error else None
        return Subject(name, "adapter", given, own, revision if base else config.get("revision"), quantization)
    if base:
        raise UserError(f"--base is for a run or an adapter; {path} is neither.")
    folder = resolve_folder(name, revision)
    return Subject(name, "merged" if (folder / MERGE_REPORT_FILE).is_file() else "base", folder, name, revision, None)


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
        base: Of a run or an adapter, if it is not where training found it.
        quantization: "nf4", "none", or "auto": what a run trained on, else not quantised.
        dtype: bfloat16 becomes float32 where the machine only emulates it.
        adapter: A run or an adapter to put on a base.

    Raises:
        UserError: Nothing that can be opened; also a tokenizer that does not belong to the model.
    """
    subject = find_subject(path, base, revision, adapter)
    target = torch.device(device) if device else default_device()
    wanted = _fitting(subject) if quantization == "auto" else quantization
    model = load_base(subject.base, wanted, _possible(dtype, target), target, subject.revision, quiet)
    fingerprint = model.base_fingerprint
    if subject.adapter:
        model = load_adapter(model, subject.adapter)
    texts = subject.folder if any(subject.folder.glob("tokenizer*")) else resolve_folder(subject.base, subject.revision)
    tokenizer = load_tokenizer(texts, model.config)
    template = subject.folder / TEMPLATE_FILE
    saved = Template.load(str(template)) if template.is_file() else None
    return OpenModel(subject, model.eval(), tokenizer, saved, fingerprint)


def _with_adapter(given: Path, name: str, base: str | None, revision: str | None, adapter: str | Path) -> Subject:
    if base is not None:
        raise UserError("Give a base and --adapter, or a run or an adapter and --base; not both.")
    if is_adapted(given):
        raise UserError(f"--adapter goes on a base or a merged model; {name} is a run or an adapter itself.")
    if not is_adapted(Path(adapter)):
        raise UserError(f"{adapter}: is no run's and no adapter's folder.")
    return find_subject(adapter, name, revision)


def is_adapted(folder: Path) -> bool:
    """Whether a folder is a run's or an adapter's."""
    return any((folder / file).is_file() for file in (MANIFEST_FILE, RECIPE_FILE, CONFIG_FILE))


def _run(folder: Path, name: str, base: str | None, revision: str | None) -> Subject:
    adapter = folder / "adapter"
    if not (adapter / CONFIG_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{folder}: this run has no adapter yet. Did the run end? Go on with it with --resume.")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        own = manifest["recipe"]["base"]
        quantization = None if own["quantization"] == "none" else own["quantization"]
        return Subject(name, "run", adapter, base or own["model"], revision if base else own["revision"], quantization)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST_FILE}: damaged ({error!r}); it does not tell the run's base.") from error


def _fitting(subject: Subject) -> str | None:
    """What a run trained on; of a base that only its 4-bit form is there of, that."""
    return "nf4" if is_cache(subject.base) else subject.quantization


def _possible(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    bfloat16 = dtype in ("bfloat16", torch.bfloat16)
    return torch.float32 if bfloat16 and not has_bfloat16(device) else dtype
