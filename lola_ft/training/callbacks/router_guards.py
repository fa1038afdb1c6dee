"""Guards of the router: the load of the experts, a warning if a router collapses, and changed choices on a fixed text.

Shapes: T tokens, M MoE layers, E experts, K choices per token.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, TrainerState

from lola_ft.data import encode_texts
from lola_ft.errors import UserError
from lola_ft.families import architecture_of
from lola_ft.model.choices import seen_choices
from lola_ft.model.experts import FusedExperts
from lola_ft.routing.measures import dead_experts, flip_rate, largest_share, load_entropy
from lola_ft.training import processes
from lola_ft.training.callbacks.alarm import Alarm
from lola_ft.training.reports.metrics import DEAD, ENTROPY, SHARE

_ENOUGH = 32  # tokens per expert; fewer tokens say little about the load
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
"""The texts of the probe, in several scripts."""


class RouterLoad:
    """Counts the real training tokens of each expert. The counts stay on the device until they are read.

    Attributes:
        layers: Numbers of the MoE layers.
        counts_ME: Tokens per expert since the last reading.
        token_mask_T: Mask of the real tokens in the next forward pass; None if all are real.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        architecture = architecture_of(model.config)
        self.layers = list(architecture.sizes.moe_layers)
        self._top_k = architecture.sizes.top_k
        shape = (len(self.layers), architecture.num_experts)
        self.counts_ME = torch.zeros(shape, dtype=torch.int64, device=model.device)
        self.token_mask_T: Tensor | None = None
        self._fresh = False
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.base_model.register_forward_pre_hook(self._begin)
        base.base_model.register_forward_hook(self._end)
        experts = [module for module in base.modules() if isinstance(module, FusedExperts)]
        assert len(experts) == len(self.layers), "every MoE layer has one module of experts"
        for place, module in enumerate(experts):
            module.register_forward_pre_hook(self._counter(place))

    def read(self) -> dict[str, float]:
        """Return the measures for a log line, of the worst layer and of each layer; resets the counts."""
        counts_ME = processes.summed(self.counts_ME.clone()).cpu()
        if not counts_ME.sum(dim=1).all():
            return {}
        self.counts_ME.zero_()
        entropy_M, share_M = load_entropy(counts_ME), largest_share(counts_ME)
        dead_M = dead_experts(counts_ME).sum(dim=1)
        line = {
            "router_min_entropy": entropy_M.min().item(),
            "router_max_share": share_M.max().item(),
            "router_dead": int(dead_M.sum()),
            "router_tokens": int(counts_ME[0].sum()) // self._top_k,
        }
        for name, values in ((ENTROPY, entropy_M), (SHARE, share_M), (DEAD, dead_M)):
            line |= {f"{name}/{layer}": round(v, 4) for layer, v in zip(self.layers, values.tolist(), strict=True)}
        return line

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts_ME}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts_ME.copy_(state["counts"])

    def _begin(self, backbone: nn.Module, _args: tuple[Any, ...]) -> None:
        """Start counting. Gradient checkpointing runs layers again later, outside this pass, which is not counted."""
        self._fresh = backbone.training

    def _end(self, *_: object) -> None:
        self._fresh = False

    def _counter(self, place: int) -> Callable[..., None]:
        def count(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._fresh:
                return
            expert_ids_TK, mask_T = args[1], self.token_mask_T
            ones_TK = torch.ones_like(expert_ids_TK)
            if mask_T is not None:
                ones_TK = ones_TK * mask_T[:, None]
            self.counts_ME[place].index_add_(0, expert_ids_TK.flatten(), ones_TK.flatten())

        return count


class RouterCollapse(TrainerCallback):
    """Warns, or ends the run, when a layer's load has too low an entropy or falls mostly on one expert."""

    def __init__(
        self, min_entropy: float, max_share: float, num_experts: int, stop: bool, alarm: Alarm, frozen: bool
    ) -> None:
        """Store the limits.

        Args:
            frozen: Whether the router is; its choices change through LoRA in earlier layers.
        """
        self.min_entropy, self.max_share, self.num_experts = min_entropy, max_share, num_experts
        self.stop, self._alarm = stop, alarm
        remedies = "Lower train.learning_rate, or raise router.aux_loss", ", or set router.mode: frozen"
        self._advice = f"{remedies[0]}{'' if frozen else remedies[1]}."

    def on_log(self, _args: object, state: TrainerState, _control: object, logs: dict[str, Any], **_: object) -> None:
        if logs.get("router_tokens", 0) < _ENOUGH * self.num_experts:
            return
        for key in [key for key in logs if key.startswith(f"{ENTROPY}/")]:
            layer = key.partition("/")[2]
            entropy, share = logs[key], logs[f"{SHARE}/{layer}"]
            collapsed = entropy < self.min_entropy or share > self.max_share
            text = (
                f"the router of layer {layer} has collapsed: one expert gets {share:.1%} of the tokens, the load's "
                f"entropy is {entropy:.2f} (1 is even)."
            )
            said = self._alarm.update(state.global_step, layer, collapsed, f"{text} {self._advice}")
            if said and self.stop:
                raise UserError(
                    f"step {state.global_step}: {text} guards.router_collapse is stop, so the run ends here; earlier "
                    f"checkpoints are unchanged. {self._advice}"
                )

    def state_dict(self) -> dict[str, Any]:
        return self._alarm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._alarm.load_state_dict(state)


class RouterProbe:
    """Compares the experts chosen for a fixed text with the base model's choices. Make it before training.

    A frozen router's choices change too, because LoRA in earlier layers changes the hidden states that it reads.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self._model = model
        longest = architecture_of(model.config).sizes.positions
        self._texts = [ids[:longest] for ids in encode_texts(list(PROBE), tokenizer)]
        # disable_adapter changes requires_grad of weights trained without LoRA, so it is restored afterwards.
        learns = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._base_TMK = self._choices(model.disable_adapter())
        for parameter, requires_grad in learns.items():
            parameter.requires_grad_(requires_grad)

    def flip_rate(self) -> float:
        """Return the share of the base's choices, over all MoE layers, that are no longer made."""
        return flip_rate(self._base_TMK, self._choices(nullcontext())).mean().item()

    def _choices(self, within: AbstractContextManager[Any]) -> Tensor:
        """Return the expert ids (T, M, K) of the whole probe, its texts one after another."""
        backbone = self._model.get_base_model().base_model
        modules = [module for module in self._model.modules() if module.training]
        self._model.eval()
        chosen = []
        with within, torch.no_grad():
            for ids in self._texts:
                with seen_choices(backbone) as layers:
                    backbone(torch.tensor([ids], device=backbone.device), use_cache=False)
                chosen.append(torch.stack([layer.expert_ids_TK for layer in layers], dim=1))
        for module in modules:
            module.training = True
        return torch.cat(chosen).cpu()
