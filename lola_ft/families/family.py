"""A base family: how the checkpoints of one `model_type` are laid out, on disk and in memory.

Loading, auditing, adapters, planning, merging, training and routing read this table and nothing else. A family is one
file beside this one; the names of its tensors stand there and nowhere else.

Names on disk are called Hub names: they identify a weight everywhere, whatever the model in memory calls it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from lola_ft.errors import UserError
from lola_ft.families.expert_layout import ExpertLayout, ExpertName
from lola_ft.families.place import LORA_GROUPS, Place


@dataclass(frozen=True)
class Routing:
    """The way in which a family's routers choose experts.

    Attributes:
        balance: The load-balancing loss of its authors: `layer_sum` (a term per layer, summed), `pooled` (one term
            over the tokens of all layers, as transformers has it), or None.
        gate: How the router holds its weight: as a `linear` layer, or as a bare `parameter` of its own.
    """

    balance: Literal["layer_sum", "pooled"] | None = None
    gate: Literal["linear", "parameter"] = "linear"


@dataclass(frozen=True)
class Sizes:
    """A config's numbers under the names that the field uses.

    Attributes:
        hidden, inner: Width of the residual stream, and between the two layers of a dense MLP.
        positions: Longest sequence in tokens.
        moe_layers: Indices of the layers with experts.
        expert_inner: Width inside an expert.
        top_k: Experts that a token uses.
        logit_divisor: What logits are divided by.
        activation: transformers' name of the activation inside MLP and experts.
        embedding_dropout, attention_dropout, residual_dropout: Probabilities, while training.
    """

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    positions: int
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    expert_inner: int = 0
    top_k: int = 0
    logit_divisor: float = 1.0
    activation: str = "gelu"
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0


@dataclass(frozen=True)
class Family:
    """All that the toolkit knows of one `model_type`.

    Attributes:
        title: What people call such models.
        heads: Model classes by head (`causal_lm`, …), each as `module:Class`, imported when it is wanted. A class of
            transformers gets LOLA's loss (`families/causal_lm.py`).
        backbone: Attribute of the causal model that holds the layers.
        positions: How it knows a token's place: by `learned` embeddings, `rotary`, or `slopes` of attention (ALiBi).
        packs: Whether its attention keeps the documents of a packed row apart.
        attention: How it is computed: `fused` (PyTorch's own, which holds no scores), `scores` (all scores are in
            memory, and a mask of numbers), `stretches` (fused, and packed documents a stretch at a time), or `latent`
            (queries and keys wider than values, which a CPU's fused attention does not take: it holds the scores).
        norm: `rms` (root mean square, computed in float32) or `layer` (LayerNorm).
        normed_embeddings: Whether a norm stands between the embeddings and the first layer.
        normed_queries: Whether norms stand behind the projections of queries and keys.
        targets: By group, endings of the names in memory of its linear layers (of the router, its module).
        renamed: Endings of module names on disk that are others in memory, with these; the experts' are in `experts`.
        size_keys: Keys of `config.json` that give the sizes; a config without them gets transformers' defaults.
        ignored: Patterns of tensors that checkpoints carry beside the weights: buffers of earlier versions.
        set_aside: Whether a tensor, by name and config, belongs to what transformers leaves out, such as layers that
            predict several tokens; a merge copies it.
        embeddings: Hub name of the input embeddings, and of the output head where a checkpoint has one.
        sizes: Read the sizes of a config.
        config_keys: Return keys of `config.json` for a small model of given sizes: the inverse of `sizes`. The layers
            with experts and the activation are the family's own.
        places: List every tensor of a checkpoint by its Hub name.
        fully: What can be trained without LoRA: norms, biases.
        experts, routing: None for a dense family.
        hub_class: Class that a merged `config.json` names, where it is another than the base's own says.
        auto_map: Code of ours beside the weights, for transformers without lola_ft: by Auto class, `file.Class` of
            `lola_ft/standalone`. Empty for families that transformers brings itself.
        licence, licence_name: The Hub's identifier and the name (Markdown), if all of its checkpoints have one licence.
        authors_url: Where the authors describe it.
        tags: For the Hub.
    """

    model_type: str
    title: str
    heads: Mapping[str, str]
    backbone: str
    positions: Literal["learned", "rotary", "slopes"]
    packs: bool
    targets: Mapping[str, tuple[str, ...]]
    size_keys: tuple[str, ...]
    embeddings: tuple[str, str]
    sizes: Callable[[Any], Sizes]
    config_keys: Callable[[Sizes], dict[str, Any]]
    places: Callable[[Any], dict[str, Place]]
    attention: Literal["fused", "scores", "stretches", "latent"] = "fused"
    norm: Literal["rms", "layer"] = "rms"
    normed_embeddings: bool = False
    fully: tuple[str, ...] = ("norms", "biases")
    normed_queries: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    set_aside: Callable[[str, Any], bool] | None = None
    experts: ExpertLayout | None = None
    routing: Routing | None = None
    hub_class: str | None = None
    auto_map: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    licence_name: str = ""
    authors_url: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """The parts that can be trained: groups that can have LoRA, norms, biases."""
        return (*self.lora_groups, *self.fully)

    @property
    def lora_groups(self) -> dict[str, tuple[str, ...]]:
        """Targets by group as PEFT is told them: modules, experts' fused parameters, the weights of bare routers."""
        own = dict(self.targets)
        if self.experts:
            own["experts"] = self.experts.targets
        if self.router_is_parameter:
            own["router"] = tuple(f"{module}.weight" for module in self.targets["router"])
        return {group: own[group] for group in LORA_GROUPS if group in own}

    @property
    def router_is_parameter(self) -> bool:
        """True if the router's module holds its weight as a bare parameter, and is no linear layer."""
        return self.routing is not None and self.routing.gate == "parameter"

    @property
    def parameter_targets(self) -> tuple[str, ...]:
        """Targets that are parameters in memory."""
        return (*self.expert_targets, *(self.lora_groups["router"] if self.router_is_parameter else ()))

    @property
    def expert_targets(self) -> tuple[str, ...]:
        """The fused parameters of experts, () for a dense family."""
        return self.experts.targets if self.experts else ()

    @property
    def balances(self) -> bool:
        """True if its authors balance the load of the experts by a loss."""
        return self.routing is not None and self.routing.balance is not None

    @property
    def native(self) -> bool:
        """True if the model class is ours; else it is transformers' own."""
        return self.heads["causal_lm"].startswith("lola_ft.")

    def parse_expert(self, module: str) -> ExpertName | None:
        """Take the Hub name of an expert's projection apart; None for any other module."""
        return self.experts.parse(module) if self.experts else None

    def in_file(self, name: str) -> str:
        """Return the name of the file's tensor that holds a tensor: another one for experts in one piece."""
        return self.experts.fused_of(name) if self.experts else name

    def in_memory(self, module: str) -> str:
        """Return the name in memory of a module outside the experts, from its name on disk."""
        return _with_ending(module, self.renamed)

    def on_disk(self, module: str) -> str:
        """Return the name on disk of a module outside the experts, from its name in memory."""
        return _with_ending(module, {memory: disk for disk, memory in self.renamed.items()})

    def target_of(self, module: str, layout: str) -> str | None:
        """Return the shortest ending of a Hub module name that says in a layout's config what is meant.

        None if the module is in no group that can have LoRA.
        """
        if expert := self.parse_expert(module):
            numbered = ".".join(module.split(".")[-3:])
            return numbered if layout == "per_expert" else self._fused_target(expert.projection)
        held = self.in_memory(module)
        for group, targets in self.targets.items():
            for target in targets:
                if held.endswith(f".{target}"):
                    by_weight = self._is_named_by_weight(target, group)
                    return f"{target}.weight" if by_weight and layout == "peft" else self.on_disk(f".{target}")[1:]
        return None

    def _is_named_by_weight(self, target: str, group: str) -> bool:
        """Tell whether PEFT's config names a module by its weight, among the `target_parameters`.

        Bare routers have no other name. And a dense layer or shared expert that is called like an expert's projection:
        PEFT (0.21) takes such a name among the `target_modules` for all the experts, and leaves the module out.
        """
        if group == "router":
            return self.router_is_parameter
        return self.experts is not None and not self.native and target.rpartition(".")[2] in self.experts.projections

    def takes_lora(self, module: str) -> bool:
        """Tell whether a module, named as an adapter's file of either layout names it, can have LoRA in this family."""
        plain = module.removesuffix(".base_layer")
        fused = self.experts is not None and plain.endswith(f".{self.experts.module}")
        return fused or self.target_of(plain, "peft") is not None

    def _fused_target(self, projection: str) -> str:
        assert self.experts is not None, "only experts have projections"
        return self.experts.targets[list(self.experts.stacks).index(self.experts.stack_of(projection))]

    def model_class(self, head: str = "causal_lm") -> type:
        """The class to build.

        Raises:
            UserError: If the family has no model with such a head.
        """
        if head not in self.heads:
            raise UserError(f"head '{head}': {self.title} models have {', '.join(self.heads)}. Use one of these.")
        module, _, name = self.heads[head].partition(":")
        found = getattr(import_module(module), name)
        if self.native:
            return found
        # Here, because it brings torch: the table itself is read without.
        from lola_ft.families.causal_lm import with_labelled_loss

        return with_labelled_loss(found)

    def is_ignored(self, name: str) -> bool:
        """Tell whether a tensor of a checkpoint is a buffer of earlier versions, not a weight."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def _with_ending(name: str, endings: Mapping[str, str]) -> str:
    """The name with its ending changed, if it is one of these."""
    found = (name.removesuffix(old) + new for old, new in endings.items() if name.endswith(f".{old}"))
    return next(found, name)
