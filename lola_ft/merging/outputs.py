"""The outputs of whole models on a few real sentences. Models are loaded one after another."""

import gc
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.families import architecture_of
from lola_ft.kernels.precision import comparison_dtype

# Ordinary sentences of several scripts, so that many experts are visited.
PROMPTS = (
    "The river was high after three days of rain, and the bridge was closed.",
    "Jina langu ni Amina na ninaishi Mombasa karibu na bahari.",
    "Die Katze schläft auf dem warmen Stein vor dem Haus.",
    "मेरे गाँव में एक पुराना बरगद का पेड़ है।",
    "يشرب جدي الشاي كل صباح في الحديقة.",
    "今日は駅前の店で新しい本を買いました。",
)
_SPARE = 1.15  # factor for the largest tensor while it is loaded, activations and logits
_SPARE_BYTES = 500_000_000  # memory of PEFT, bitsandbytes and the modules that they import


@dataclass(frozen=True)
class Outputs:
    """The token ids (S,) of one prompt, its logits (S, V), and the scores of its L routers (N, E), N = S*L.

    Scores are ordered by token, then by layer. Without routers they are zeros (S, 1), as if one expert took all tokens.

    Attributes:
        dtype: Dtype of the computation.
        top_k: Experts per token.
    """

    ids_S: Tensor
    logits_SV: Tensor
    scores_NE: Tensor
    dtype: str
    top_k: int = 1

    def choices(self) -> Tensor:
        """Return (N, E) bool, True for the experts that a token chooses."""
        chosen = self.scores_NE.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(self.scores_NE, dtype=torch.bool).scatter_(1, chosen, value=True)


@dataclass(frozen=True)
class Models:
    """The models of a merge (base plus adapter, merged), to be run one after another.

    Attributes:
        base, adapter, merged: Folders of the base, the adapter and the result.
        compute: Dtype of weights and computation of all models.
    """

    base: Path
    adapter: Path
    merged: Path
    compute: torch.dtype

    def adapted(self, quantization: str | None) -> list[Outputs]:
        """Run base plus adapter, with the base dense or in 4 bit."""
        from lola_ft.adapters import load_adapter
        from lola_ft.quantization import load_base

        model = load_base(self.base, quantization, self.compute, quiet=True)
        return _run(load_adapter(model, self.adapter, allow_other_base=True), self._prompt_ids())

    def merged_alone(self) -> list[Outputs]:
        """Run the merged model as transformers loads it."""
        from transformers import AutoModelForCausalLM

        from lola_ft.quantization.load import default_device

        model = AutoModelForCausalLM.from_pretrained(self.merged, dtype=self.compute)
        return _run(model.to(default_device()), self._prompt_ids())

    def _prompt_ids(self) -> list[Tensor]:
        """Return the prompts' token ids, (1, S) each; without a tokenizer, ids spread over the vocabulary."""
        from transformers import AutoTokenizer

        if any(self.merged.glob("tokenizer*")):
            tokenizer = AutoTokenizer.from_pretrained(self.merged)
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
        else:
            vocab_size = BaseCheckpoint.open(self.merged).architecture.sizes.vocab
            ids = [[(17 * row + 7919 * i) % vocab_size for i in range(16)] for row in range(len(PROMPTS))]
        return [torch.tensor([row[:64]]) for row in ids]


def compute_dtype(parameters: int, weights_dtype: torch.dtype) -> torch.dtype:
    """Return float32 if the model is small or the machine has no faster dtype, else the dtype of its weights."""
    # Imported late, so that a merge without models does not import bitsandbytes.
    from lola_ft.quantization.load import default_device

    return comparison_dtype(parameters, weights_dtype, default_device())


def too_large(parameters: int, compute: torch.dtype) -> str:
    """Return the reason why a model with this number of parameters cannot be loaded here; "" if it can."""
    needed = parameters * compute.itemsize * _SPARE + _SPARE_BYTES
    free = {"memory": psutil.virtual_memory().available}
    if torch.cuda.is_available():
        free["GPU memory"] = torch.cuda.mem_get_info()[0]
    for kind, size in free.items():
        if needed > size:
            return f"the model needs about {needed / 1e9:.1f} GB of {kind} to run and {size / 1e9:.1f} GB are free"
    return ""


@torch.no_grad()
def _run(model: nn.Module, prompts: list[Tensor]) -> list[Outputs]:
    model.eval()
    parameter = next(model.parameters())
    name = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    results = []
    architecture = architecture_of(model.config)
    top_k = architecture.sizes.top_k or 1
    for ids in prompts:
        if architecture.family.routing:
            out = model(ids.to(parameter.device), output_router_logits=True)
            scores = torch.stack(out.router_logits, dim=1).flatten(0, 1).float().cpu()
        else:
            out = model(ids.to(parameter.device))
            scores = torch.zeros(ids.shape[1], 1)
        results.append(Outputs(ids[0], out.logits[0].float().cpu(), scores, name, top_k))
    del model
    gc.collect()
    return results
