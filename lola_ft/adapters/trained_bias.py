"""Fully trained biases: each adapter has its own, and the base's biases do not change.

PEFT's `bias="all"` trains the base's own tensors. So only one adapter can do it, disabling the adapter does not restore
the base, and the experts' stacks are left out. Here a bias is parametrised (`torch.nn.utils.parametrize`):
`module.bias` is the active adapter's tensor or, without an adapter, the base's.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lola_ft.adapters.layouts import PREFIX
from lola_ft.adapters.selection import Selection, check_selection
from lola_ft.errors import AdapterError
from lola_ft.families import Architecture, architecture_of
from lola_ft.model.experts import FusedExperts

_IN_MEMORY = re.compile(r"\.parametrizations\.(?P<kind>\w+)\.0\.trained_bias$")


class TrainedBias(AuxiliaryTrainingWrapper):
    """The parametrisation of one bias, or of the stack of biases of a layer's experts.

    Of a stack, an adapter may hold only some experts' rows. PEFT activates, disables, saves and loads the
    parametrisation like its own `modules_to_save`.

    Attributes:
        trained_bias: The biases by adapter, float32.
        experts_of: Experts whose rows an adapter holds. An adapter that holds the whole tensor is not listed.
    """

    adapter_layer_names = ("trained_bias",)
    __getattr__ = nn.Module.__getattr__  # the parent's searches a wrapped module, which does not exist here

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.trained_bias = nn.ParameterDict()
        self.experts_of: dict[str, tuple[int, ...]] = {}
        self._adapters: set[str] = set()
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    def add(self, adapter_name: str, own: Tensor, experts: tuple[int, ...] | None) -> None:
        """Add an adapter's bias: a copy of the base's bias `own`, or of some experts' rows of it."""
        rows = own.detach() if experts is None else own.detach()[list(experts)]
        self.trained_bias[adapter_name] = nn.Parameter(rows.float().clone())
        self._adapters.add(adapter_name)
        if experts is not None:
            self.experts_of[adapter_name] = experts

    def forward(self, own: Tensor) -> Tensor:
        if self.disable_adapters or not self._active_adapter:
            return own
        name = self._active_adapter[0]
        bias = self.trained_bias[name].to(own.dtype)
        if name not in self.experts_of:
            return bias
        return own.index_copy(0, torch.tensor(self.experts_of[name], device=own.device), bias)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        known = [name for name in names if name in self._adapters]
        if len(known) > 1:
            raise AdapterError(f"adapters {', '.join(known)} each train the biases; activate one of them at a time.")
        return known[0] if known else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        name = self.check_set_adapter(adapter_names)
        self._active_adapter = [] if name is None else [name]
        for other, bias in self.trained_bias.items():
            bias.requires_grad_(other == name and not inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        if adapter_name in self._adapters:
            del self.trained_bias[adapter_name]
            self._adapters.remove(adapter_name)
            self.experts_of.pop(adapter_name, None)
            self.set_adapter(list(new_active_adapters or ()))

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        held = self.adapter_state_dict_load_map(adapter_name)
        return {key: state_dict[own_key] for key, own_key in held.items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return {"trained_bias": f"trained_bias.{adapter_name}"} if adapter_name in self._adapters else {}

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        raise AdapterError("PEFT cannot unload trained biases. Merge with `lola-ft merge` (lola_ft.merge).")


def bias_names(architecture: Architecture, selection: Selection | None, norms: bool) -> list[str]:
    """List the Hub names of all biases that an adapter may train; for experts, only those of the selected experts.

    Args:
        norms: Include the norms' biases.

    Raises:
        UserError: If the selection does not fit the model.
    """
    places = architecture.places
    names = [name for name in architecture.bias_names if norms or places[name].group != "norms"]
    if selection is None:
        return names
    layers = list(dict.fromkeys(places[name].module for name in names if places[name].expert is not None))
    check_selection(selection, len(layers), architecture.num_experts)
    chosen = dict(zip(layers, selection, strict=True))
    return [name for name in names if places[name].expert is None or places[name].expert in chosen[places[name].module]]


def train_biases(model: PeftModel, names: Collection[str], adapter_name: str) -> None:
    """Add an adapter's own biases, by Hub names. They are active if the adapter is."""
    places = architecture_of(model.config).places
    experts_of: dict[str, list[int]] = {}
    for place in (places[name] for name in names):
        experts_of.setdefault(place.parameter, []).extend([] if place.expert is None else [place.expert])
    owners = _owners(model)
    for parameter, experts in experts_of.items():
        owner, _, kind = parameter.rpartition(".")
        module = owners[owner]
        if not parametrize.is_parametrized(module, kind):
            parametrize.register_parametrization(module, kind, TrainedBias())
        trained, own = module.get_submodule(f"parametrizations.{kind}.0"), _own(module, kind)
        assert isinstance(trained, TrainedBias), f"{parameter} is parametrised by something else"
        own.requires_grad_(False)
        rows = tuple(sorted(experts))
        trained.add(adapter_name, own, rows if rows and len(rows) < len(own) else None)
        trained.set_adapter(model.active_adapters)


def drop_copied_biases(model: PeftModel) -> None:
    """Remove other adapters' biases that PEFT copied together with a fully trained norm."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                if parametrize.is_parametrized(copy, "bias"):
                    own = _own(copy, "bias")
                    # torch's `remove_parametrizations` would change the class, which the original module shares.
                    del copy._modules["parametrizations"]
                    copy.__class__ = type(copy).__bases__[0]
                    copy.register_parameter("bias", own)


@contextmanager
def seen_by_peft(model: nn.Module) -> Iterator[None]:
    """Hide the experts' biases inside the block, so that PEFT finds the expert weights for LoRA.

    PEFT (0.21) finds the parameters of a parametrised module only by their full names.
    """
    experts = [m for m in model.modules() if isinstance(m, FusedExperts) and parametrize.is_parametrized(m)]
    aside = [(module, module._modules.pop("parametrizations")) for module in experts]
    try:
        yield
    finally:
        for module, biases in aside:
            module._modules["parametrizations"] = biases


def partly_trained(model: nn.Module, adapter_name: str) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Return the experts and the base's stack for stacks of which an adapter holds some rows, by name in memory."""
    return {
        plain_key(f"{path}.trained_bias").removeprefix(PREFIX): (
            module.experts_of[adapter_name],
            model.get_parameter(f"{path.removesuffix('.0')}.original").detach(),
        )
        for path, module in model.named_modules()
        if isinstance(module, TrainedBias) and adapter_name in module.experts_of
    }


def plain_key(key: str) -> str:
    """Return a trained bias's name in the model without adapters, from its name in PEFT's state or in a file."""
    return key if ".lora_" in key else _without_wrappers(_IN_MEMORY.sub(r".\g<kind>", key))


def _without_wrappers(path: str) -> str:
    return path.replace(".base_layer", "").replace(".original_module", "")


def _own(module: nn.Module, kind: str) -> nn.Parameter:
    """Return the base's tensor."""
    return module.get_parameter(f"parametrizations.{kind}.original")


def _owners(model: PeftModel) -> dict[str, nn.Module]:
    """Return the base's modules that have a bias, without their wrappers, by their name in the base."""
    return {
        _without_wrappers(path): module
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm | FusedExperts) and ".modules_to_save." not in path
    }
