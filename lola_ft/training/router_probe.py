"""A fixed text in several scripts, and how many of its tokens go to other experts than in the base.

A frozen router changes its choices too, as what it reads drifts: LoRA in earlier layers moves the hidden states.

Shapes: T tokens, M MoE layers.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lola_ft.data import encode_texts
from lola_ft.routing.measures import flip_rate

PROBE = (
    "The river rises in the mountains and reaches the sea after three hundred kilometres.",
    "Mto huu unaanzia milimani na kufika baharini baada ya kilomita mia tatu.",
    "Der Fluss entspringt im Gebirge und mündet nach dreihundert Kilometern ins Meer.",
    "Река начинается в горах и через триста километров впадает в море.",
    "ينبع النهر من الجبال ويصل إلى البحر بعد ثلاثمائة كيلومتر.",
    "नदी पहाड़ों से निकलती है और तीन सौ किलोमीटर बाद समुद्र में मिलती है।",
    "这条河发源于山区,流经三百公里后入海。",
    "川は山から流れ出て、三百キロメートル先で海に注ぐ。",
    "def area(width, height):\n    return width * height  # in square metres",
)


class RouterProbe:
    """Remembers what the base chooses; made before anything is trained."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self._model = model
        longest = model.config.n_positions
        self._texts = [ids[:longest] for ids in encode_texts(list(PROBE), tokenizer)]
        # PEFT switches gradients off with an adapter, and on with it: those of weights trained otherwise stay as set.
        learns = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._base_TM = self._choices(model.disable_adapter())
        for parameter, requires_grad in learns.items():
            parameter.requires_grad_(requires_grad)

    def flip_rate(self) -> float:
        """The share of tokens, over all MoE layers, that go elsewhere now."""
        return flip_rate(self._base_TM, self._choices(nullcontext())).mean().item()

    def _choices(self, within: AbstractContextManager[Any]) -> Tensor:
        """Expert ids (T, M) of the whole probe, one text after the other."""
        backbone = self._model.get_base_model().transformer
        modules = [module for module in self._model.modules() if module.training]
        self._model.eval()
        with within, torch.no_grad():
            chosen = []
            for ids in self._texts:
                ids_BS = torch.tensor([ids], device=backbone.wte.weight.device)
                logits = backbone(ids_BS, use_cache=False, output_router_logits=True).router_logits
                chosen.append(torch.stack([logits_TE.argmax(dim=-1) for logits_TE in logits], dim=1))
        for module in modules:
            module.training = True
        return torch.cat(chosen).cpu()
