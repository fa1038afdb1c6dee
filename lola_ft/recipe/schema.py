"""The schema of a recipe: every key with its type, range, default and one line of explanation.

A section is a frozen pydantic model: unknown keys are refused and nothing is converted (`"4"` and `true` are not
numbers; a whole number is accepted as a decimal). Rules between keys are in the section's `_rules`. A rule names the
key to blame, so that the loader can point at the key's line.
"""

import os.path
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from lola_ft.recipe import preference_rules, unsupported
from lola_ft.recipe.allowed_values import INSTRUCTION_FIELDS, OPTIMIZERS, PREFERENCE_LOSS_TYPES, SCHEDULERS, Format
from lola_ft.recipe.document import KeyPath
from lola_ft.repo_id import is_repo_id
from lola_ft.row_formats import FORMAT_FIELDS, JSON_FILES, ROWS_OF_THEIR_OWN, TEXT_TABLES, kind_of_file

Rank = Annotated[int, Field(ge=1, le=1024)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Interval = Annotated[int, Field(ge=0, le=1_000_000_000)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


def _without_tilde(path: str) -> str:
    """Put the home folder in place of a `~` at the beginning of a path. No other code does this."""
    whole = os.path.expanduser(path)  # noqa: PTH111 - a name or Hub id must stay the text that it is
    if whole.startswith("~"):
        raise PydanticCustomError(
            "no_home", "no home folder is known for the `~` at its beginning. Write the whole path"
        )
    return whole


PathName = Annotated[Name, AfterValidator(_without_tilde)]
"""A path, or a name in place of a path. Relative paths start at the folder where the command runs."""

UNION_TAGS = ("<name>", "<layers>", "<share>", "<sources>")
"""Names of the alternative types of a value. pydantic makes them part of a mistake's place."""

Problem = tuple[KeyPath, str]
"""A broken rule: the path from the section to the key to blame (`()` for the section itself), and the message."""


class Section(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def _rules(self) -> Iterable[Problem]:
        """Yield this section's broken rules between keys."""
        return ()

    @model_validator(mode="after")
    def _follow_rules(self, info: ValidationInfo) -> Self:
        """Check the rules.

        Validation's context may hold keys (section class, name) that were left out because their values were wrong.
        Their defaults are removed here: a rule that reads such a key stops the check of its section. So every problem
        reported is one that holds for any value of the missing keys.
        """
        problems = list[Problem]()
        for section, key in info.context or ():
            if section is type(self):
                self.__dict__.pop(key, None)
        try:
            for problem in self._rules():
                problems.append(problem)
        except (AttributeError, KeyError):
            if not info.context:
                raise
        if problems:
            text = "; ".join(f"{'.'.join(map(str, key))}: {message}" for key, message in problems)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": problems})
        return self


class Base(Section):
    """The base model to fine-tune. Its files never change."""

    model: PathName = Field(description="Hub id or folder of the base model")
    revision: Name = Field(default="main", description="branch, tag or commit of the base on the Hub")
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="form of the frozen weights: nf4 (4 bit) or none"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="number format for computing"
    )
    offload: Literal["none", "experts"] = Field(
        default="none",
        description="weights to keep in host memory for a small GPU: none, or the experts' 4-bit weights",
    )

    def _rules(self) -> Iterable[Problem]:
        if self.offload == "experts" and self.quantization == "none":
            yield (
                ("offload",),
                "only 4-bit weights can be kept in host memory, but quantization is none. Remove one of the two",
            )


class GroupLora(Section):
    """LoRA on one group of weights."""

    rank: Rank = Field(description="rank of the two LoRA matrices")
    alpha: float | None = Field(default=None, gt=0, description="this group's alpha, in place of adapter.alpha")
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="this group's dropout, in place of adapter.dropout"
    )


class ExpertLora(GroupLora):
    """LoRA on the experts, one pair of matrices per expert."""

    select: Annotated[
        Annotated[PathName, Tag("<name>")] | Annotated[list[list[int]], Tag("<layers>")],
        Discriminator(
            lambda value: {str: "<name>", list: "<layers>"}.get(type(value)),
            custom_error_type="expert_selection",
            custom_error_message="expected `all`, a list of expert numbers per MoE layer, or a file",
        ),
    ] = Field(
        default="all",
        description="experts to train: all, a list of numbers per MoE layer, or a file of `lola-ft routing select`",
    )


class Adapter(Section):
    """The weights that get LoRA. A group that is left out gets no LoRA."""

    attention: GroupLora | None = Field(default=None, description="LoRA on the attention projections")
    mlp: GroupLora | None = Field(default=None, description="LoRA on the dense blocks' projections")
    shared_experts: GroupLora | None = Field(
        default=None, description="LoRA on the experts that every token uses, where the base has them"
    )
    experts: ExpertLora | None = Field(default=None, description="LoRA on the experts' projections")
    alpha: float = Field(default=32.0, gt=0, description="LoRA's alpha: updates are scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="share of LoRA's inputs dropped in training")
    variant: Literal["lora", "rslora", "dora"] = Field(
        default="lora",
        description="lora; rslora scales by alpha / sqrt(rank); dora also learns lengths (attention and mlp only)",
    )
    init: Literal["default", "gaussian", "loftq", "pissa"] = Field(
        default="default", description="starting values of LoRA; loftq corrects the rounding error of the 4-bit base"
    )
    norms: bool = Field(default=False, description="fully train the norms (no LoRA)")
    biases: bool = Field(
        default=False, description="fully train the biases (no LoRA); in experts, only those of the selected experts"
    )
    continue_from: Name | None = Field(
        default=None,
        description="run, adapter folder or Hub id to continue training from; it decides which weights are trained",
    )
    revision: Name | None = Field(default=None, description="branch, tag or commit of continue_from on the Hub (main)")

    def _rules(self) -> Iterable[Problem]:
        if self.init == "pissa":
            yield (
                ("init",),
                "pissa subtracts LoRA's starting values from the base's weights: the adapter would fit a base that "
                "nobody else has, and a 4-bit base would have to be quantised again. Choose loftq, gaussian or default",
            )
        if self.revision is not None and self.continue_from is None:
            yield ("revision",), "belongs to continue_from, and that is not set. Set it, or remove this"
        groups = (self.attention, self.mlp, self.shared_experts)
        if self.variant == "dora" and not any(groups) and self.continue_from is None:
            yield ("variant",), "dora acts on attention and mlp, and neither has a rank. Give one, or choose lora"
        if self.variant == "dora" and self.init == "loftq":
            yield (
                ("init",),
                "loftq starts LoRA away from zero, and dora's lengths assume a start at zero. Choose one of the two",
            )


class Router(Section):
    """Training of the router, which chooses each token's experts."""

    mode: Literal["frozen", "tuned", "lora"] = Field(
        default="frozen", description="training of the router: frozen (none), tuned (fully trained) or lora"
    )
    rank: Rank | None = Field(default=None, description="mode lora: rank of LoRA on the router (8)")
    aux_loss: float = Field(default=0.0, ge=0, description="weight of the load-balancing loss (0: none)")
    z_loss: float = Field(
        default=0.0, ge=0, description="weight of the loss that keeps the router's scores small (0: none)"
    )

    def _rules(self) -> Iterable[Problem]:
        if self.rank is not None and self.mode != "lora":
            yield ("rank",), f"a rank belongs to mode lora, and mode is {self.mode}. Remove it, or write `mode: lora`"


class Source(Section):
    """A source of rows: local files or a dataset on the Hub."""

    path: PathName | None = Field(
        default=None,
        description="local .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file, a folder of them, or a glob",
    )
    hub: Name | None = Field(default=None, description="dataset id on the Hub")
    subset: Name | None = Field(default=None, description="configuration of the Hub dataset, often a language")
    split: Name | None = Field(default=None, description="split of the Hub dataset (train)")
    revision: Name | None = Field(default=None, description="branch, tag or commit of the Hub dataset")
    streaming: bool = Field(default=False, description="read the Hub dataset row by row, without downloading it first")
    limit: Count | None = Field(default=None, description="read only this many rows, the first ones")
    unit: Literal["paragraph", "line", "file"] | None = Field(
        default=None, description="one row of a .txt file: a paragraph (between blank lines), a line, or the whole file"
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        default=None, description="character between the cells of a .csv or .tsv file (found automatically if left out)"
    )
    quoting: bool | None = Field(
        default=None, description="whether cells may be in quotation marks (true for .csv, false for .tsv)"
    )
    rows_under: Name | None = Field(
        default=None, description="key of a .json file that holds the list of rows (found automatically if left out)"
    )
    format: Format = Field(description="format of the rows: the fields of a row and their meaning")
    language: Name | None = Field(default=None, description="language code of every row")
    language_column: Name | None = Field(default=None, description="field of a row that holds its language code")
    fields: dict[str, Name] = Field(
        default={}, description="field names that differ, as `name in the format: name in the file`"
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        default={}, description="conversations: unusual role names, as `name in the file: role`; common ones are known"
    )
    join_turns: bool = Field(default=False, description="conversations: join consecutive turns of the same role")
    trim_last_turn: bool = Field(
        default=False, description="conversations: leave out turns at the end that no answer follows"
    )
    labels: Annotated[dict[str, Name], Field(min_length=1)] | None = Field(
        default=None, description="classification: the word for each label, as `label in the file: word`"
    )
    source_language: Name | None = Field(default=None, description="translation: language code of every source text")
    target_language: Name | None = Field(default=None, description="translation: language code of every translation")
    instruction: Name | None = Field(
        default=None,
        description="alpaca, classification, translation: instruction of every row; {text} inserts its field text",
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_split(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("hub") is not None and given.get("split") is None:
            return given | {"split": "train"}
        return given

    def _rules(self) -> Iterable[Problem]:
        if (self.path is None) == (self.hub is None):
            yield (), "give exactly one of `path` (a local file) and `hub` (a dataset on the Hub)"
        for key in ("subset", "split", "revision", "streaming"):
            if self.hub is None and self.path is not None and getattr(self, key) not in (None, False):
                yield (key,), "is for a dataset on the Hub, and this source is a local file. Remove it"
        if self.unit is not None and (self.path is None or kind_of_file(self.path) in ROWS_OF_THEIR_OWN):
            yield ("unit",), "divides .txt files into rows; this source has rows already. Remove it"
        for key, kinds in (("delimiter", TEXT_TABLES), ("quoting", TEXT_TABLES), ("rows_under", JSON_FILES)):
            other = self.path is None or kind_of_file(self.path) in {*ROWS_OF_THEIR_OWN, ".txt"} - {*kinds}
            if getattr(self, key) is not None and other:
                yield (key,), f"is for {' and '.join(kinds)} files; this source has none. Remove it"
        if self.delimiter is not None and self.delimiter in '"\r\n':
            yield ("delimiter",), "cannot be a quotation mark or a line break"
        if self.language is not None and self.language_column is not None:
            yield ("language_column",), "give `language` or `language_column`, not both"
        known = FORMAT_FIELDS[self.format]
        for name in self.fields:
            if name not in known:
                yield ("fields", name), f"format {self.format} has no field '{name}'; it has {', '.join(known)}"
        yield from self._format_rules()

    def _format_rules(self) -> Iterable[Problem]:
        """Yield broken rules: keys of another format, and names that the instruction cannot use."""
        for key, formats in _KEYS_OF_FORMATS.items():
            if getattr(self, key) not in (None, {}, False) and self.format not in formats:
                yield (key,), f"belongs to format {' or '.join(formats)}; this source has {self.format}. Remove it"
        for side in ("source_language", "target_language"):
            if self.format == "translation" and getattr(self, side) is not None and side in self.fields:
                yield (side,), f"give `{side}` or map it with `fields`, not both"
        if self.instruction is not None and "instruction" in self.fields:
            yield ("instruction",), "give `instruction` or map it with `fields`, not both"
        places = INSTRUCTION_FIELDS.get(self.format, ())
        for name in re.findall(r"\{(\w+)\}", self.instruction or "") if places else ():
            if name not in places:
                known = ", ".join(f"{{{place}}}" for place in places)
                yield ("instruction",), f"names {{{name}}}; format {self.format} has {known}"
            elif name == "labels" and self.labels is None:
                yield ("instruction",), "names {labels}, and this source has no `labels`. Add them"


_CONVERSATIONS = ("messages", "prompt_completion", "preference", "unpaired_preference")
_KEYS_OF_FORMATS = {
    "roles": _CONVERSATIONS,
    "join_turns": _CONVERSATIONS,
    "trim_last_turn": ("messages",),
    "labels": ("classification",),
    "source_language": ("translation",),
    "target_language": ("translation",),
    "instruction": ("alpaca", "classification", "translation"),
}


def _kind_of_validation(value: Any) -> str | None:
    if isinstance(value, list):
        return "<sources>"
    return "<share>" if isinstance(value, int | float) and not isinstance(value, bool) else None


class Data(Section):
    """The data that the model learns from."""

    template: PathName = Field(
        default="alpaca",
        description="prompt template: a bundled one, chat (the tokenizer's own), or a path that ends in .jinja",
    )
    sources: list[Source] = Field(min_length=1, description="where the training rows come from")
    learn: Literal["all_answers", "last_answer"] = Field(
        default="all_answers", description="answers of a conversation that are learned; other answers are only read"
    )
    special_tokens: list[Name] = Field(
        default=[], description="special tokens to add to the tokenizer if it lacks them; their embeddings are trained"
    )
    normalize: Literal["none", "nfc"] = Field(default="none", description="nfc: Unicode NFC; none: no change")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="a row that cannot be used: error stops, skip leaves it out and lists it"
    )
    language_temperature: float = Field(
        default=1.0, ge=1, description="T evens languages out: n rows of a language count as n^(1/T)"
    )
    max_per_language: Count | None = Field(default=None, description="most examples of one language per epoch")
    max_repeats: Count = Field(default=4, description="most times that mixing repeats a row per epoch")
    deduplicate: bool = Field(default=False, description="leave out training rows that repeat an earlier one")
    leakage: Literal["error", "drop", "allow"] = Field(
        default="error",
        description="training rows that are also validation rows: error stops, drop leaves them out, allow keeps them",
    )
    max_length: int = Field(default=1024, ge=2, description="longest sequence in tokens")
    overlong: Literal["drop", "split", "truncate", "error"] = Field(
        default="drop",
        description="rows longer than max_length: drop, split (plain text only), truncate, or stop with an error",
    )
    packing: bool = Field(
        default=True, description="put several rows into one sequence, kept apart by the attention mask"
    )
    validation: Annotated[
        Annotated[Share, Tag("<share>")] | Annotated[list[Source], Field(min_length=1), Tag("<sources>")],
        Discriminator(
            _kind_of_validation,
            custom_error_type="validation_kind",
            custom_error_message="expected a share such as 0.02, or a list of sources",
        ),
    ] = Field(
        default=0.0, description="share of the rows to hold out for validation, or a list of sources of validation rows"
    )

    def _rules(self) -> Iterable[Problem]:
        if self.max_repeats != 4 and self.language_temperature == 1:
            yield ("max_repeats",), "no row is repeated at language_temperature 1. Raise that key, or remove this one"
        if self.leakage != "error" and not isinstance(self.validation, list):
            yield ("leakage",), "is for a list of validation sources; a share of the rows cannot leak. Remove it"
        rows = [*self.sources, *(self.validation if isinstance(self.validation, list) else [])]
        if self.learn != "all_answers" and not any(source.format in ("messages", "alpaca") for source in rows):
            yield ("learn",), "is for conversations with several answers, and no source has them. Remove it"
        answers = next((source.format for source in rows if source.format != "text"), None)
        if self.overlong == "split" and answers is not None:
            yield (
                ("overlong",),
                f"`split` cuts plain text only, and format {answers} has an answer that belongs to its prompt. "
                "Choose drop, truncate or error",
            )


class EarlyStopping(Section):
    """Rule for ending a run that no longer improves."""

    metric: Name = Field(
        default="eval_loss", description="loss to watch: eval_loss, or eval_loss_by_language/sw for one language"
    )
    patience: Count = Field(default=3, description="evaluations in a row without improvement after which the run ends")
    min_delta: float = Field(default=0.0, ge=0, description="smallest decrease that counts as an improvement")


class Energy(Section):
    """Estimate of the energy used (needs the extra `energy`; never uses the network)."""

    country: Annotated[str, Field(pattern="^[A-Z]{3}$")] = Field(
        description="country of the electricity: ISO 3166 code of three letters, such as DEU"
    )


class Train(Section):
    """Length, speed and batch sizes of the training."""

    epochs: float = Field(default=1.0, gt=0, le=100_000, description="passes over the data")
    max_steps: Count | None = Field(default=None, description="optimiser steps, instead of epochs")
    micro_batch_size: BatchSize = Field(default=4, description="sequences in one forward pass")
    grad_accum_steps: BatchSize = Field(default=4, description="forward passes in one optimiser step")
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="highest learning rate")
    lora_plus_ratio: float = Field(
        default=1.0, ge=1, description="LoRA+: the learning rate of LoRA's B over that of A; 1 for plain LoRA"
    )
    scheduler: Literal[SCHEDULERS] = Field(default="cosine", description="how the learning rate changes")  # type: ignore[valid-type]
    warmup_ratio: Share = Field(default=0.03, description="share of the steps in which the learning rate rises")
    extended_schedule: Literal["stretch", "restart"] = Field(
        default="stretch",
        description="a run made longer: stretch its schedule over all steps, or restart it over the added steps",
    )
    optimizer: Literal[OPTIMIZERS] = Field(default="adamw_8bit", description="optimiser")  # type: ignore[valid-type]
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="decay of the trained weights")
    max_grad_norm: float = Field(default=1.0, gt=0, description="larger gradients are scaled down to this norm")
    gradient_checkpointing: bool = Field(default=True, description="recompute activations: less memory, more time")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of every random choice")
    save_every: Interval = Field(default=200, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(default=2, description="checkpoints kept on disk")
    eval_every: Interval = Field(default=200, description="steps between evaluations; 0: only at the end")
    early_stopping: EarlyStopping | None = Field(
        default=None, description="end the run when the validation loss no longer falls"
    )
    keep_best: bool = Field(
        default=False, description="keep the checkpoint with the lowest validation loss, and end with its adapter"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default=[], description="trackers that receive the metrics too"
    )
    energy: Energy | None = Field(default=None, description="estimate energy and emissions with codecarbon")
    log_every: Count = Field(default=1, description="steps between lines of metrics.jsonl")
    beta: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="dpo and kto: how strongly the model is kept near its reference (0.1)"
    )
    reference: Literal["adapter", "base"] | None = Field(
        default=None,
        description="dpo and kto: model that training is kept near: adapter (the one of adapter.continue_from; default "
        "if that is set) or base",
    )
    reference_pass: Literal["auto", "before", "beside"] | None = Field(
        default=None,
        description="dpo and kto: when the reference is computed: before (once, before the first step), beside (in "
        "every step) or auto (the cheaper of the two)",
    )
    loss_type: Literal[PREFERENCE_LOSS_TYPES] | None = Field(  # type: ignore[valid-type]
        default=None, description="dpo: sigmoid, hinge, ipo, ...; kto: kto or apo_zero_unpaired"
    )
    resume: Literal["never", "auto"] = Field(
        default="never", description="auto: continue an unfinished run of the same recipe in the output folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_warmup(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("scheduler") == "constant" and "warmup_ratio" not in given:
            return given | {"warmup_ratio": 0.0}
        return given

    def _rules(self) -> Iterable[Problem]:
        if self.max_steps is not None and "epochs" in self.model_fields_set:
            yield ("max_steps",), "train.epochs and train.max_steps both say when to stop. Give one of them"
        if self.scheduler == "constant" and self.warmup_ratio > 0:
            yield ("warmup_ratio",), "scheduler constant has no warm-up. Choose constant_with_warmup, or set this to 0"


class Guards(Section):
    """Guards: problems watched for while training, and the reaction to each."""

    max_nonfinite: Count = Field(
        default=3,
        description="the run ends after this many steps in a row without a finite loss and gradient (each is skipped)",
    )
    loss_spike: float = Field(
        default=6.0, ge=0, description="report a loss that is this many deviations above the running median; 0: never"
    )
    router_collapse: Literal["warn", "stop", "off"] = Field(
        default="warn", description="reaction to a router that sends nearly all tokens to few experts"
    )
    min_load_entropy: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="a MoE layer has collapsed if the entropy of its load is below this (1: even load)",
    )
    max_load_share: float = Field(
        default=0.9, gt=0, le=1, description="a MoE layer has collapsed if one expert gets more than this share"
    )
    router_flips: bool = Field(
        default=True, description="log the share of a probe text's tokens whose expert differs from the base model's"
    )
    forgetting: float = Field(
        default=0.1, ge=0, description="report a language whose validation loss rises by this many nats; 0: never"
    )


class Hub(Section):
    """Repository where the adapter is published at the end of the run."""

    repo: Name = Field(description="repository to publish to, such as user/name")
    private: bool = Field(default=False, description="whether a new repository is private")
    base_id: Name | None = Field(default=None, description="Hub id of the base, if base.model is a folder")
    layout: Literal["peft", "per_expert"] = Field(default="peft", description="layout of the published adapter")

    def _rules(self) -> Iterable[Problem]:
        for key in ("repo", "base_id"):
            given = getattr(self, key)
            if given is not None and not is_repo_id(given):
                yield (key,), f"'{given}' is not the id of a repository. Write it as owner/name"


class Recipe(Section):
    """Everything a run needs to know."""

    objective: Literal["sft", "dpo", "kto"] = Field(
        default="sft", description="learn answers (sft), which of two is better (dpo), or which are good (kto)"
    )
    base: Base = Field(description="the base model to fine-tune")
    adapter: Adapter = Field(default=Adapter(), description="which weights get LoRA")
    router: Router = Field(default=Router(), description="training of the router")
    data: Data = Field(description="what the model learns from")
    train: Train = Field(default=Train(), description="length, speed and batch sizes")
    guards: Guards = Field(default=Guards(), description="problems watched for while training")
    hub: Hub | None = Field(default=None, description="repository where the adapter is published at the end")
    output: PathName = Field(description="folder to write the run to")

    @model_validator(mode="before")
    @classmethod
    def _resolve_preference(cls, given: Any) -> Any:
        return preference_rules.with_defaults(_with_router_rank(given))

    def _rules(self) -> Iterable[Problem]:
        adapter = self.adapter
        groups = (adapter.attention, adapter.mlp, adapter.shared_experts, adapter.experts)
        beside = (adapter.norms, adapter.biases, adapter.continue_from, self.data.special_tokens)
        if self.router.mode == "frozen" and not any((*groups, *beside)):
            advice = "Give a rank to attention, mlp or experts, or set router.mode to tuned"
            yield ("adapter",), f"nothing would be trained. {advice}"
        if self.adapter.variant == "dora" and self.router.mode == "lora":
            yield ("router", "mode"), "dora acts only on attention and mlp. Choose tuned or frozen, or another variant"
        if self.adapter.init == "loftq" and self.base.quantization == "none":
            yield ("adapter", "init"), "loftq corrects a 4-bit base, and this base is not quantised. Choose default"
        for key in ("early_stopping", "keep_best"):
            if getattr(self.train, key) and not self.data.validation:
                yield ("train", key), "needs validation data to choose by. Set data.validation"
            elif getattr(self.train, key) and not self.train.eval_every:
                yield ("train", key), "needs evaluations during the run. Set train.eval_every"
        base = self.base.model
        if self.hub and self.hub.base_id is None and (Path(base).is_dir() or not is_repo_id(base)):
            yield (
                ("hub", "base_id"),
                f"the base is a folder on this machine ({base}), which others cannot load. Give its Hub id, owner/name",
            )
        yield from preference_rules.problems(self.model_dump())
        yield from unsupported.find(self.model_dump())


def _with_router_rank(given: Any) -> Any:
    """Return the recipe's data with a default rank of LoRA on the router, unless an adapter to continue has one."""
    router, adapter = (given.get(key) if isinstance(given, dict) else None for key in ("router", "adapter"))
    if not isinstance(router, dict) or router.get("mode") != "lora" or router.get("rank") is not None:
        return given
    continues = isinstance(adapter, dict) and adapter.get("continue_from") is not None
    return given if continues else given | {"router": router | {"rank": 8}}
