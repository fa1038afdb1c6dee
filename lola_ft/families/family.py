"""A base family: how the checkpoints of one `model_type` are laid out, on disk and in memory.

Loading, auditing, adapters, planning, merging, training and routing read this table and nothing else. A family is one
file beside this one; the names of its tensors stand there and nowhere else.

Names on disk are called Hub names: they identify a weight everywhere, whatever the model in memory calls it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

from lola_ft.errors import UserError

LORA_GROUPS = ("attention", "mlp", "shared_experts", "experts", "router")
"""Groups of weights that a recipe can give LoRA, if the family has them."""
QUANTIZED_GROUPS = ("attention", "mlp", "shared_experts", "experts")
"""Groups whose matrices 4-bit loading quantises."""


@dataclass(frozen=True)
class Place:
    """One tensor of a checkpoint, and where it lives in the model in memory.

    Attributes:
        parameter: Name of the model's parameter that holds it.
        shape: On disk.
        group: One of `LORA_GROUPS`, or norms, embeddings, head, other. A bias belongs to the group of its weight.
        layer: Index of its layer.
        expert: The expert's id; the parameter then is a stack (E, …) and the tensor one slice of it.
        in_by_out: The matrix is stored in×out on disk; else out×in, as `nn.Linear` holds it.
        part: The expert's projection, where several of them share a stack (`gate_proj` or `up_proj`).
        float32: It is held in float32 whatever the model's dtype.
        correction: It corrects a router's choice and is never trained: a buffer in memory.
    """

    parameter: str
    shape: tuple[int, ...]
    group: str
    layer: int | None = None
    expert: int | None = None
    in_by_out: bool = False
    part: str | None = None
    float32: bool = False
    correction: bool = False

    @property
    def quantized(self) -> bool:
        """Whether 4-bit loading quantises this tensor."""
        return self.group in QUANTIZED_GROUPS and len(self.shape) == 2

    @property
    def transposed(self) -> bool:
        """Whether disk and memory differ in orientation: linear layers are out×in in memory, experts as on disk."""
        return self.in_by_out and self.expert is None

    @property
    def module(self) -> str:
        """Name of the module in memory that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Name of the parameter within its module."""
        return self.parameter.rpartition(".")[2]

    @property
    def out_in(self) -> tuple[int, int]:
        """Outputs and inputs of a matrix."""
        rows, columns = self.shape
        return (columns, rows) if self.in_by_out else (rows, columns)


@dataclass(frozen=True)
class ExpertName:
    """A Hub module name of one expert's projection, taken apart: fused module in memory, expert's id, projection."""

    module: str
    expert: int
    projection: str


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of an MoE layer are fused in memory and named on disk.

    Attributes:
        module: Ending of the fused module's name in memory, such as `moe.experts`.
        stacks: Each fused parameter in the order in which the module registers them, with the projections on disk
            that it holds side by side: one, or gate and up.
        on_disk: Ending of the name under which the experts are numbered on disk.
        fused: By fused parameter, the ending of the module whose weight holds it on disk for all experts, where a file
            does not number them: tensors of the file are then slices of it.
    """

    module: str
    stacks: Mapping[str, tuple[str, ...]]
    on_disk: str = ""
    fused: Mapping[str, str] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names on disk of an expert's matrices, in order."""
        return tuple(name for names in self.stacks.values() for name in names)

    @property
    def targets(self) -> tuple[str, ...]:
        """The fused parameters as PEFT's `target_parameters` name them."""
        return tuple(f"{self.module.rpartition('.')[2]}.{stack}" for stack in self.stacks)

    def stack_of(self, projection: str) -> str:
        """The fused parameter that holds a projection."""
        return next(stack for stack, names in self.stacks.items() if projection in names)

    def part_of(self, projection: str) -> tuple[int, int]:
        """Which part of its stack a projection is, and of how many: (0, 1) alone, (1, 2) for up behind gate."""
        names = self.stacks[self.stack_of(projection)]
        return names.index(projection), len(names)

    def parse(self, module: str) -> ExpertName | None:
        """Take the Hub name of an expert's projection apart; None for any other module."""
        if match := self._pattern.match(module):
            return ExpertName(f"{match['layer']}{self.module}", int(match["expert"]), match["projection"])
        return None

    def name(self, module: str, expert: int, projection: str) -> str:
        """The Hub name of an expert's projection, from the fused module's name in memory."""
        return f"{module.removesuffix(self.module)}{self.on_disk or self.module}.{expert}.{projection}"

    def fused_in(self, name: str) -> tuple[str, ...]:
        """Hub names, but for the expert's number, of what a tensor of a file holds for every expert; () for others."""
        for stack, ending in self.fused.items():
            if name.endswith(f".{ending}.weight"):
                module = name.removesuffix(f"{ending}.weight") + (self.on_disk or self.module)
                return tuple(f"{module}.{{expert}}.{projection}.weight" for projection in self.stacks[stack])
        return ()

    def fused_of(self, name: str) -> str:
        """Name of the tensor of a file that a tensor is a slice of; its own if it is none."""
        found = self.parse(name.removesuffix(".weight")) if self.fused else None
        if found is None:
            return name
        return f"{found.module.removesuffix(self.module)}{self.fused[self.stack_of(found.projection)]}.weight"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names, numbered = "|".join(self.projections), re.escape(self.on_disk or self.module)
        return re.compile(rf"^(?P<layer>.+\.){numbered}\.(?P<expert>\d+)\.(?P<projection>{names})$")


@dataclass(frozen=True)
class Routing:
    """How a family's routers choose experts.

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
    """What the toolkit knows of one `model_type`.

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
        """What can be trained: groups that can have LoRA, norms, biases."""
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
        """Whether the router's module holds its weight as a bare parameter, and is no linear layer."""
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
    def native(self) -> bool:
        """Whether the model class is ours; else it is transformers' own."""
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
        """Whether PEFT's config names a module by its weight, among the `target_parameters`.

        Bare routers have no other name. And a dense layer or shared expert that is called like an expert's projection:
        PEFT (0.21) takes such a name among the `target_modules` for all the experts, and leaves the module out.
        """
        if group == "router":
            return self.router_is_parameter
        return self.experts is not None and not self.native and target.rpartition(".")[2] in self.experts.projections

    def takes_lora(self, module: str) -> bool:
        """Whether a module, named as an adapter's file of either layout names it, can have LoRA in this family."""
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
        """Whether a tensor of a checkpoint is a buffer of earlier versions, not a weight."""
        return any(re.search(pattern, name) for pattern in self.ignored)


@dataclass(frozen=True)
class Architecture:
    """A family with one config: every tensor and size of one base.

    Attributes:
        config: transformers' config of the base.
    """

    family: Family
    config: Any = field(repr=False)

    @cached_property
    def sizes(self) -> Sizes:
        return self.family.sizes(self.config)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor of a checkpoint, by its Hub name, in the order of the layers."""
        return self.family.places(self.config)

    @property
    def num_experts(self) -> int:
        return self.sizes.num_experts

    @cached_property
    def matrices(self) -> dict[tuple[int | None, str], list[tuple[int, int]]]:
        """Outputs and inputs of the linear layers, in order, by layer and group; the experts' are left out."""
        found: dict[tuple[int | None, str], list[tuple[int, int]]] = {}
        for place in self.places.values():
            if place.group in LORA_GROUPS and place.expert is None and len(place.shape) == 2:
                found.setdefault((place.layer, place.group), []).append(place.out_in)
        return found

    @cached_property
    def norm_modules(self) -> tuple[str, ...]:
        """Names of the normalisation layers, without what stands before them: what PEFT's `modules_to_save` takes."""
        return self._last_names("norms", ".weight")

    @cached_property
    def router_modules(self) -> tuple[str, ...]:
        """The router's name, likewise, with as much before it as tells it from other modules."""
        return tuple(self._module_to_save(module) for module in self.family.targets.get("router", ()))

    def is_in_router(self, module: str) -> bool:
        """Whether a module in memory is a router or a part of one."""
        return any(f".{target}." in f"{module}." for target in self.family.targets.get("router", ()))

    def trained_module(self, name: str) -> str:
        """Return what PEFT's `modules_to_save` calls the module of a fully trained weight, given its Hub name."""
        module = self.family.in_memory(name.rpartition(".")[0])
        routers = (target for target in self.family.targets.get("router", ()) if f".{target}." in f"{module}.")
        return next(map(self._module_to_save, routers), module.rpartition(".")[2])

    def _module_to_save(self, router: str) -> str:
        """PEFT takes every module whose name ends so, also a `shared_expert_gate` for `gate`."""
        last = router.rpartition(".")[2]
        others = (place.module for place in self.places.values() if place.group != "router")
        return router if any(module.endswith(last) for module in others) else last

    @cached_property
    def bias_names(self) -> tuple[str, ...]:
        """Hub names of all biases."""
        return tuple(name for name in self.places if name.endswith(".bias"))

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Names of input embeddings and output head, if they are one tensor."""
        _, head = self.family.embeddings
        return () if head in self.places else tuple(name.split(".")[-2] for name in self.family.embeddings)

    @property
    def tied_reason(self) -> str:
        """Why input embeddings and output head cannot have LoRA."""
        embeddings, head = self.tied_modules
        return (
            f"{self.family.title}'s embeddings ({embeddings}) and output head ({head}) are one tensor, so two updates "
            "of it contradict each other and could not be merged."
        )

    @property
    def features(self) -> tuple[str, ...]:
        """What can be trained: groups for LoRA, norms, biases."""
        beside = [name for name, has in (("norms", self.norm_modules), ("biases", self.bias_names)) if has]
        held = {place.group for place in self.places.values()}
        return (*(group for group in self.family.lora_groups if group in held), *beside)

    def group_of(self, name: str) -> str | None:
        """Return the group of a module or parameter of the model in memory, whatever PEFT has wrapped around it."""
        own = _WRAPPERS.sub("", name.partition(".lora_")[0].partition(".parametrizations.")[0])
        return self._groups.get(own) or self._groups.get(own.rpartition(".")[0])

    @cached_property
    def _groups(self) -> dict[str, str]:
        places = list(self.places.values())
        modules = {place.module: place.group for place in reversed(places)}  # its first tensor says what it is
        return modules | {place.parameter: place.group for place in places}

    def kind_of(self, name: str) -> Place | None:
        """A tensor with the same name but for its numbers (layer, expert): tells what a name means in this family."""
        return self._kinds.get(_without_numbers(name))

    @cached_property
    def _kinds(self) -> dict[str, Place]:
        return {_without_numbers(name): place for name, place in reversed(self.places.items())}

    def _last_names(self, group: str, ending: str) -> tuple[str, ...]:
        found = (name for name, place in self.places.items() if place.group == group and name.endswith(ending))
        return tuple(dict.fromkeys(name.split(".")[-2] for name in found))

    def require(self, wanted: Mapping[str, str], has: Collection[str] | None = None) -> None:
        """Refuse what this family lacks: the one place and form in which that is said.

        Args:
            wanted: What is asked for, by the key that asks for it: `{"adapter.experts": "experts"}`.
            has: What there is, if not `features`.

        Raises:
            UserError: Naming every key, what is missing and what there is.
        """
        known = self.features if has is None else has
        missing = {key: feature for key, feature in wanted.items() if feature not in known}
        if missing:
            lacks = " and no ".join(dict.fromkeys(missing.values()))
            raise UserError(
                f"{', '.join(missing)}: the base is a {self.family.title} model ({self.family.model_type}), which has "
                f"no {lacks}. It has {', '.join(known)}. Leave {'them' if len(missing) > 1 else 'it'} out, or "
                "choose another base."
            )


_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")
"""What PEFT puts into the names of modules."""


def _with_ending(name: str, endings: Mapping[str, str]) -> str:
    """The name with its ending changed, if it is one of these."""
    found = (name.removesuffix(old) + new for old, new in endings.items() if name.endswith(f".{old}"))
    return next(found, name)


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
