"""A base family: the layout of the checkpoints of one `model_type`, on disk and in memory.

Loading, auditing, adapters, planning, merging, training and routing read only this table. Each family has one file in
this folder, the only place where the names of its tensors are written.

Names on disk are called Hub names. They identify a weight everywhere, whatever its name in memory.
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
            over the tokens of all layers, as in transformers), or None.
        gate: Form of the router's weight: a `linear` layer, or a bare `parameter`.
    """

    balance: Literal["layer_sum", "pooled"] | None = None
    gate: Literal["linear", "parameter"] = "linear"


@dataclass(frozen=True)
class Sizes:
    """A config's numbers under the names that the field uses.

    Attributes:
        hidden: Width of the residual stream.
        inner: Width inside a dense MLP.
        positions: Longest sequence in tokens.
        moe_layers: Indices of the layers with experts.
        expert_inner: Width inside an expert.
        top_k: Experts per token.
        logit_divisor: Divisor of the logits.
        activation: transformers' name of the activation inside MLP and experts.
        embedding_dropout, attention_dropout, residual_dropout: Probabilities, in training.
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
    """The facts about one `model_type` that the toolkit uses.

    Attributes:
        title: The models' common name.
        heads: Model classes by head (`causal_lm`, …), each as `module:Class`, imported at first use. Classes of
            transformers get LOLA's loss (`families/causal_lm.py`).
        backbone: Attribute of the causal model that holds the layers.
        positions: Form of a token's position: `learned` embeddings, `rotary`, or `slopes` of attention (ALiBi).
        packs: True if its attention keeps the documents of a packed row apart.
        attention: The way to compute it, which decides about memory: `fused` (PyTorch's own, which holds no scores),
            `scores` (all scores and a mask of numbers are in memory), or `latent` (queries and keys are wider than
            values, which fused attention on a CPU does not support: it holds the scores).
        norm: `rms` (root mean square, computed in float32) or `layer` (LayerNorm).
        normed_embeddings: True if there is a norm between the embeddings and the first layer.
        normed_queries: True if there are norms after the projections of queries and keys.
        targets: Endings of the linear layers' names in memory, by group; for the router, of its module.
        renamed: Endings of module names that differ between disk (key) and memory (value). Those of experts are in
            `experts`.
        size_keys: Keys of `config.json` that give the sizes. Without them a config would get transformers' defaults.
        ignored: Patterns of tensors in checkpoints that are no weights: buffers of earlier versions.
        set_aside: Function of a tensor's name and the config: True for weights that transformers does not load, such as
            layers that predict several tokens. A merge copies them.
        embeddings: Hub names of the input embeddings, and of the output head if a checkpoint has one.
        sizes: Function that reads the sizes of a config.
        config_keys: Function that returns the keys of `config.json` for a small model of given sizes, the inverse of
            `sizes`. The layers with experts and the activation are the family's own.
        places: Function that lists every tensor of a checkpoint by Hub name.
        fully: The groups that can be fully trained (no LoRA): norms, biases.
        experts, routing: None for a dense family.
        hub_class: Class that a merged `config.json` names, if it is not the one in the base's config.
        auto_map: lola_ft's code for the folder of the weights, for transformers without lola_ft: by Auto class,
            `file.Class` of `lola_ft/standalone`. Empty for families that transformers supports itself.
        licence, licence_name: The Hub's identifier and the name (Markdown), if all checkpoints have the same licence.
        authors_url: Web page of the authors about the models.
        tags: Tags for the Hub.
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
    attention: Literal["fused", "scores", "latent"] = "fused"
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
        """PEFT's targets by group: modules, fused parameters of experts, weights of bare routers."""
        own = dict(self.targets)
        if self.experts:
            own["experts"] = self.experts.targets
        if self.router_is_parameter:
            own["router"] = tuple(f"{module}.weight" for module in self.targets["router"])
        return {group: own[group] for group in LORA_GROUPS if group in own}

    @property
    def router_is_parameter(self) -> bool:
        """True if the router is not a linear layer, but a module with its weight as a bare parameter."""
        return self.routing is not None and self.routing.gate == "parameter"

    @property
    def parameter_targets(self) -> tuple[str, ...]:
        """The targets that are parameters in memory, not modules."""
        return (*self.expert_targets, *(self.lora_groups["router"] if self.router_is_parameter else ()))

    @property
    def expert_targets(self) -> tuple[str, ...]:
        """The fused parameters of experts; () for a dense family."""
        return self.experts.targets if self.experts else ()

    @property
    def balances(self) -> bool:
        """True if the family's authors balance the load of the experts with a loss."""
        return self.routing is not None and self.routing.balance is not None

    @property
    def native(self) -> bool:
        """True if the model class is lola_ft's own, False if it is transformers'."""
        return self.heads["causal_lm"].startswith("lola_ft.")

    def parse_expert(self, module: str) -> ExpertName | None:
        """Split the Hub name of an expert's projection into its parts; return None for any other module."""
        return self.experts.parse(module) if self.experts else None

    def in_file(self, name: str) -> str:
        """Return the name of the file's tensor that holds this tensor. They differ if a file holds experts fused."""
        return self.experts.fused_of(name) if self.experts else name

    def in_memory(self, module: str) -> str:
        """Return the name in memory of a module outside the experts, from its name on disk."""
        return _with_ending(module, self.renamed)

    def on_disk(self, module: str) -> str:
        """Return the name on disk of a module outside the experts, from its name in memory."""
        return _with_ending(module, {memory: disk for disk, memory in self.renamed.items()})

    def target_of(self, module: str, layout: str) -> str | None:
        """Return the name of a module among the targets of an adapter's config: an ending of its Hub name.

        Args:
            layout: `peft` or `per_expert`.

        Returns:
            The shortest ending that is clear; None if the module is in no group that can have LoRA.
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
        """Return True if PEFT's config names a module by its weight, among the `target_parameters`.

        There are two cases. A bare router has no other name. And a dense layer or shared expert may have the name of an
        expert's projection: PEFT (0.21) takes it among the `target_modules` for all experts, and skips the module.
        """
        if group == "router":
            return self.router_is_parameter
        return self.experts is not None and not self.native and target.rpartition(".")[2] in self.experts.projections

    def takes_lora(self, module: str) -> bool:
        """Return True if a module can have LoRA in this family; named as in an adapter's file of either layout."""
        plain = module.removesuffix(".base_layer")
        fused = self.experts is not None and plain.endswith(f".{self.experts.module}")
        return fused or self.target_of(plain, "peft") is not None

    def _fused_target(self, projection: str) -> str:
        assert self.experts is not None, "only experts have projections"
        return self.experts.targets[list(self.experts.stacks).index(self.experts.stack_of(projection))]

    def model_class(self, head: str = "causal_lm") -> type:
        """Return the model class with this head.

        Raises:
            UserError: If the family has no model with this head.
        """
        if head not in self.heads:
            raise UserError(f"head '{head}': {self.title} models have {', '.join(self.heads)}. Use one of these.")
        module, _, name = self.heads[head].partition(":")
        found = getattr(import_module(module), name)
        if self.native:
            return found
        # Imported late, because it imports torch, which reading the table does not need.
        from lola_ft.families.causal_lm import with_labelled_loss

        return with_labelled_loss(found)

    def is_ignored(self, name: str) -> bool:
        """Return True if a tensor of a checkpoint is a buffer of earlier versions, not a weight."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def _with_ending(name: str, endings: Mapping[str, str]) -> str:
    """Replace the ending of a name if it is one of `endings`."""
    found = (name.removesuffix(old) + new for old, new in endings.items() if name.endswith(f".{old}"))
    return next(found, name)
