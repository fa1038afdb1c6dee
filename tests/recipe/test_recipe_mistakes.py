"""Every mistake that a recipe can hold: its message has the line, the key, the values and the remedy."""

import re
import time
from pathlib import Path

import pytest

from lola_ft.errors import RecipeError
from lola_ft.recipe import load_recipe
from tests.conftest import assert_says

GOOD = [
    "base: {model: some/model}",
    "adapter: {attention: {rank: 4}}",
    "data: {sources: [{path: a.jsonl, format: alpaca}]}",
    "train: {}",
    "output: runs/x",
]


def mistakes(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The messages for a recipe, `r.yaml` standing for its path, without columns."""
    return [re.sub(r"^(r\.yaml:\d+):\d+: ", r"\1: ", message) for message in full_mistakes(folder, text, *overrides)]


def full_mistakes(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The messages for a recipe, `r.yaml` standing for its path."""
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "r.yaml").splitlines()


def assert_each_says(found: list[str], expected: list[str]) -> None:
    """Check that there are as many messages as expected, each with its parts."""
    assert len(found) == len(expected), found
    for message, parts in zip(found, expected, strict=True):
        assert_says(message, parts)


def with_line(line: int, text: str) -> str:
    """The good recipe with one line (from 1) put differently."""
    return "\n".join([*GOOD[: line - 1], text, *GOOD[line:]]) + "\n"


def with_source(text: str, more: str = "") -> str:
    return with_line(3, f"data: {{sources: [{{{text}}}]{more}}}")


RANGES = [
    (1, "base: {model: ''}", "base.model: must not be empty."),
    (2, "adapter: {mlp: {rank: 0}}", "adapter.mlp.rank: must be at least 1; got 0."),
    (2, "adapter: {mlp: {rank: 4096}}", "adapter.mlp.rank: must be at most 1024; got 4096."),
    (2, "adapter: {mlp: {rank: 4}, alpha: 0}", "adapter.alpha: must be more than 0; got 0."),
    (2, "adapter: {mlp: {rank: 4}, alpha: .inf}", "adapter.alpha: expected a finite number; got inf."),
    (2, "adapter: {mlp: {rank: 4}, dropout: 1}", "adapter.dropout: must be less than 1; got 1."),
    (3, "data: {sources: []}", "data.sources: must not be empty."),
    (4, "train: {learning_rate: -1e-4}", "train.learning_rate: must be more than 0; got -0.0001."),
    (4, "train: {warmup_ratio: 1.5}", "train.warmup_ratio: must be less than 1; got 1.5."),
    (4, "train: {micro_batch_size: 0}", "train.micro_batch_size: must be at least 1; got 0."),
    (4, "train: {seed: -1}", "train.seed: must be at least 0; got -1."),
    (4, "train: {max_steps: 0}", "train.max_steps: must be at least 1; got 0."),
    (4, "train: {save_every: 1_000_000_001}", "train.save_every: must be at most 1000000000; got 1000000001."),
    (4, "train: {grad_accum_steps: 100_000}", "train.grad_accum_steps: must be at most 65536; got 100000."),
    (4, "train: {seed: 4294967296}", "train.seed: must be at most 4294967295; got 4294967296."),
    (4, "train: {epochs: 1e9}", "train.epochs: must be at most 100000; got 1000000000.0."),
    (
        3,
        "data: {sources: [{hub: a, format: text, limit: 2e9}]}",
        "data.sources.0.limit: expected a whole number; got 2000000000.0.",
    ),
    (4, "train: {keep: 0}", "train.keep: must be at least 1; got 0."),
]

TYPES = [
    (1, "base: some/model", "base: expected a mapping such as {key: value}; got 'some/model'."),
    (1, "base: {model: 7}", "base.model: expected text; got 7. Put it in quotes."),
    (1, "base: {model: [x]}", "base.model: expected text; got a list."),
    (2, "adapter: {mlp: 8}", "adapter.mlp: expected a mapping such as {key: value}; got 8."),
    (2, "adapter: {mlp: {rank: '4'}}", "adapter.mlp.rank: expected a whole number; got '4'. Write 4 without quotes."),
    (2, "adapter: {mlp: {rank: 4.5}}", "adapter.mlp.rank: expected a whole number; got 4.5."),
    (2, "adapter: {mlp: {rank: true}}", "adapter.mlp.rank: expected a whole number; got true."),
    (2, "adapter: {mlp: {rank: four}}", "adapter.mlp.rank: expected a whole number; got 'four'."),
    (
        2,
        "adapter: {experts: {rank: 4, select: 3}}",
        "adapter.experts.select: expected `all`, a list of expert numbers per MoE layer, or a file; got 3.",
    ),
    (3, "data: {sources: a.jsonl}", "data.sources: expected a list; got 'a.jsonl'."),
    (3, "data: {sources: [a.jsonl]}", "data.sources.0: expected a mapping such as {key: value}; got 'a.jsonl'."),
    (
        3,
        "data: {sources: [{path: a, format: text, fields: [x]}]}",
        "data.sources.0.fields: expected a mapping such as {key: value}; got a list.",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text}], validation: yes}",
        "data.validation: expected a share such as 0.02, or a list of sources; got 'yes'.",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text}], validation: 1.0}",
        "data.validation: must be less than 1; got 1.0.",
    ),
    (4, "train: {gradient_checkpointing: 1}", "train.gradient_checkpointing: expected true or false; got 1."),
    (
        4,
        "train: {gradient_checkpointing: off}",
        "train.gradient_checkpointing: expected true or false; got 'off'. Write false without quotes.",
    ),
    (
        4,
        "train: {learning_rate: '1e-4'}",
        "train.learning_rate: expected a number; got '1e-4'. Write 1e-4 without quotes.",
    ),
    (4, "train: {epochs: null}", "train.epochs: expected a number; got nothing."),
    (4, "train:", "train: expected a mapping such as {key: value}; got nothing."),
    (5, "output: 2024-01-01", None),  # a folder's name, not a date
]

CHOICES = [
    (
        1,
        "base: {model: m, quantization: nf5}",
        "base.quantization: expected one of nf4, none; got 'nf5'. Did you mean 'nf4'?",
    ),
    (
        1,
        "base: {model: m, quantization: null}",
        "base.quantization: expected one of nf4, none; got nothing. Did you mean 'none'?",
    ),
    (
        1,
        "base: {model: m, dtype: float23}",
        "base.dtype: expected one of bfloat16, float16, float32; got 'float23'. Did you mean 'float32'?",
    ),
    (
        2,
        "adapter: {mlp: {rank: 4}, variant: LoRA}",
        "adapter.variant: expected one of lora, rslora, dora; got 'LoRA'. Did you mean 'lora'?",
    ),
    (
        4,
        "train: {optimizer: adamw8bit}",
        "train.optimizer: expected a name that transformers knows; got 'adamw8bit'. Did you mean 'adamw_8bit'?",
    ),
    (
        3,
        "data: {sources: [{path: a, format: csv}]}",
        "data.sources.0.format: expected one of alpaca, prompt_completion, text, messages, classification, "
        "translation, preference, unpaired_preference; got 'csv'.",
    ),
]

KEYS = [
    (2, "adapter: {attention: {rnak: 4}}", "adapter.attention.rnak: unknown key. Did you mean 'rank'?"),
    (2, "adapter: {start: runs/a}", "adapter.start: unknown key. Did you mean 'adapter.continue_from'?"),
    (2, "adapter: {rnak: 4}", "adapter.rnak: unknown key. Did you mean 'rank'? It belongs in adapter.attention."),
    (2, "adapter: {experts: {rank: 2, r: 4}}", "adapter.experts.r: unknown key. Did you mean 'rank'?"),
    (4, "rank: 4", "rank: unknown key. Did you mean 'adapter.attention.rank'?"),
    (4, "learning_rate: 1e-4", "learning_rate: unknown key. Did you mean 'train.learning_rate'?"),
    (4, "lora_alpha: 16", "lora_alpha: unknown key. Did you mean 'adapter.alpha'?"),
    (4, "train: {lr: 1e-4}", "train.lr: unknown key. Did you mean 'learning_rate'?"),
    (4, "train: {max_length: 64}", "train.max_length: unknown key. Did you mean 'data.max_length'?"),
    (4, "train: {outputs: x}", "train.outputs: unknown key. Did you mean 'output'? It belongs at the top."),
    (4, "trian: {}", "trian: unknown key. Did you mean 'train'?"),
    (
        4,
        "train.seed: 3",
        "train.seed: unknown key. Dots in keys work only on the command line; write `train: {seed: …}`.",
    ),
    (4, "zzz: 3", "zzz: unknown key."),
    (4, "3: 3", "3: unknown key."),
]

RULES = [
    (
        2,
        "adapter: {}",
        "adapter: nothing would be trained. … rank … attention, mlp or experts … router.mode … tuned",
    ),
    (
        3,
        "data: {sources: [{path: a, format: alpaca}], overlong: split}",
        "data.overlong: `split` … alpaca … Choose drop, truncate or error",
    ),
    (
        4,
        "train: {epochs: 1, max_steps: 9}",
        "train.max_steps: … train.epochs … Give one",
    ),
    (
        4,
        "train: {scheduler: constant, warmup_ratio: 0.1}",
        "train.warmup_ratio: scheduler constant … constant_with_warmup, or set this to 0",
    ),
    (
        2,
        "adapter: {experts: {rank: 4}, variant: dora}",
        "adapter.variant: dora … attention and mlp … rank … or choose lora",
    ),
    (
        2,
        "adapter: {mlp: {rank: 4}, init: pissa}",
        "adapter.init: pissa … the base's weights … Choose loftq, gaussian or default",
    ),
    (
        2,
        "adapter: {mlp: {rank: 4}, variant: dora, init: loftq}",
        "adapter.init: loftq … dora … Choose one",
    ),
    (
        2,
        "adapter: {mlp: {rank: 4, dropout: 1.0}}",
        "adapter.mlp.dropout: must be less than 1; got 1.0.",
    ),
    (
        4,
        "router: {mode: tuned, rank: 4}",
        "router.rank: … mode is tuned. Remove it, or write `mode: lora`",
    ),
]

RULES += [
    (
        3,
        "data: {sources: [{path: a, format: text}], max_repeats: 2}",
        "data.max_repeats: … language_temperature 1 … remove this",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text}], leakage: drop, validation: 0.1}",
        "data.leakage: … validation sources … Remove it",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text}, {path: b, format: messages}], overlong: split}",
        "data.overlong: `split` … messages … Choose drop, truncate or error",
    ),
]
RANGES += [
    (
        3,
        "data: {sources: [{path: a, format: text}], language_temperature: 0.5}",
        "data.language_temperature: must be at least 1; got 0.5.",
    ),
    (3, "data: {sources: [{path: a, format: text}], max_repeats: 0}", "data.max_repeats: must be at least 1; got 0."),
    (
        3,
        "data: {sources: [{path: a, format: text}], max_per_language: 0}",
        "data.max_per_language: must be at least 1; got 0.",
    ),
    (3, "data: {sources: [{path: a, format: text, limit: 0}]}", "data.sources.0.limit: must be at least 1; got 0."),
]
CHOICES += [
    (
        3,
        "data: {sources: [{path: a, format: text}], on_bad_row: ignore}",
        "data.on_bad_row: expected one of error, skip; got 'ignore'.",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text}], normalize: NFC}",
        "data.normalize: expected one of none, nfc; got 'NFC'. Did you mean 'nfc'?",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text, unit: sentence}]}",
        "data.sources.0.unit: expected one of paragraph, line, file; got 'sentence'.",
    ),
    (
        3,
        "data: {sources: [{path: a, format: text}], leakage: skip}",
        "data.leakage: expected one of error, drop, allow; got 'skip'.",
    ),
]

SOURCES = [
    ("format: text", ": … exactly one of `path` … and `hub`"),
    (
        "path: a, hub: b, format: text",
        ": … exactly one of `path` … and `hub`",
    ),
    ("path: a", ".format: missing"),
    ("path: a, format: text, split: dev", ".split: … Hub … Remove it"),
    ("path: a, format: text, revision: v1", ".revision: … Hub … Remove it"),
    (
        "path: a, format: text, language: sw, language_column: lang",
        ".language_column: … `language` or `language_column`, not both",
    ),
    (
        "path: a, format: alpaca, fields: {answer: output}",
        ".fields.answer: format alpaca has no field 'answer'; it has instruction, input, output, system, history.",
    ),
    ("path: a, format: text, fields: {text: 3}", ".fields.text: expected text; got 3. Put it in quotes."),
    ("path: a, format: text, pth: b", ".pth: unknown key. Did you mean 'path'?"),
    ("path: a, format: text, subset: sw", ".subset: … Hub … Remove it"),
    (
        "path: a, format: text, streaming: true",
        ".streaming: … Hub … Remove it",
    ),
    ("path: a.csv, format: text, unit: line", ".unit: … .txt … Remove it"),
    ("hub: a/b, format: text, unit: line", ".unit: … .txt … Remove it"),
    (
        "path: a, format: text, labels: {0: a}",
        ".labels: … classification … text. Remove it",
    ),
    (
        "path: a, format: text, instruction: Say it.",
        ".instruction: … alpaca or classification or translation … text. Remove it",
    ),
    (
        "path: a, format: alpaca, instruction: Say it., fields: {instruction: q}",
        ".instruction: … `instruction` … `fields`, not both",
    ),
    (
        "path: a, format: classification, source_language: en",
        ".source_language: … translation … classification. Remove it",
    ),
    (
        "path: a, format: translation, target_language: sw, fields: {target_language: to}",
        ".target_language: … `target_language` … `fields`, not both",
    ),
    (
        "path: a, format: translation, instruction: 'Say {text} in {target_language}'",
        ".instruction: names {text}; format translation has {source}, {source_language}, {target_language}.",
    ),
    (
        "path: a, format: classification, instruction: 'One of {labels}?'",
        ".instruction: names {labels} … no `labels`. Add them",
    ),
    ("path: a, format: classification, labels: {}", ".labels: must not be empty."),
    ("path: a, format: classification, labels: [a]", ".labels: expected a mapping such as {key: value}; got a list."),
    ("path: a, format: classification, labels: {0: 1}", ".labels.0: expected text; got 1. Put it in quotes."),
    (
        "path: a, format: messages, fields: {prompt: p}",
        ".fields.prompt: format messages has no field 'prompt'; it has messages, system, tools.",
    ),
]

NOT_YET = [
    (
        4,
        "train: {scheduler: warmup_stable_decay}",
        "train.scheduler: … settings … Choose another, such as cosine",
    ),
    (
        4,
        "train: {scheduler: greedy}",
        "train.scheduler: … not supported … Choose another, such as cosine",
    ),
    (
        4,
        "train: {optimizer: galore_adamw}",
        "train.optimizer: … Choose another, such as adamw_8bit",
    ),
]


@pytest.mark.parametrize(("line", "text", "message"), [*RANGES, *TYPES, *CHOICES, *RULES, *NOT_YET])
def test_a_wrong_value_is_explained_at_its_line(tmp_path: Path, line: int, text: str, message: str | None) -> None:
    if message is None:
        (tmp_path / "r.yaml").write_text(with_line(line, text))
        assert load_recipe(tmp_path / "r.yaml").output == "2024-01-01"
    else:
        assert_each_says(mistakes(tmp_path, with_line(line, text)), [f"r.yaml:{line}: {message}"])


@pytest.mark.parametrize(("line", "text", "message"), KEYS)
def test_an_unknown_key_is_named_with_a_suggestion(tmp_path: Path, line: int, text: str, message: str) -> None:
    expected = f"r.yaml:{line}: {message}"
    assert expected in mistakes(tmp_path, with_line(line, text))


@pytest.mark.parametrize(("text", "message"), SOURCES)
def test_a_wrong_source_is_explained(tmp_path: Path, text: str, message: str) -> None:
    assert_each_says(mistakes(tmp_path, with_source(text)), [f"r.yaml:3: data.sources.0{message}"])


def test_missing_keys_are_named_at_the_line_of_their_parent(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "# a comment\nadapter:\n  mlp: {rank: 4}\ndata:\n  max_length: 8\nbase: {}\n") == [
        "r.yaml:2: output: missing (folder to write the run to).",
        "r.yaml:4: data.sources: missing (where the training rows come from).",
        "r.yaml:6: base.model: missing (Hub id or folder of the base model).",
    ]


def test_a_misspelt_required_key_is_both_unknown_and_missing(tmp_path: Path) -> None:
    assert mistakes(tmp_path, with_line(1, "base: {modle: m}")) == [
        "r.yaml:1: base.model: missing (Hub id or folder of the base model).",
        "r.yaml:1: base.modle: unknown key. Did you mean 'model'?",
    ]


def test_all_mistakes_come_in_one_message_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "output: runs/x",
            "train:",
            "  seed: 1",
            "  seed: 2",
            "  scheduler: cosin",
            "router: {mode: frozen, rank: 4}",
            "adapter:",
            "  rank: 4",
            "base: {model: m}",
        ]
    )
    found = mistakes(tmp_path, text, "train.keep=no", "train.keep", "data.max_length=4096")
    assert [message.partition(": ")[0] for message in found] == [
        "r.yaml:4",
        "r.yaml:5",
        "r.yaml:6",
        "r.yaml:8",
        "override 'data.max_length=4096'",
        "override 'train.keep=no'",
        "override 'train.keep'",
    ]
    assert found[0] == "r.yaml:4: train.seed: given twice, first on line 3."
    assert found[4] == ("override 'data.max_length=4096': data.sources: missing (where the training rows come from).")


def test_every_mistake_has_its_column(tmp_path: Path) -> None:
    text = "base: {model: 3}\nadapter:\n  attention: {rank: 4}\n  mlp:  {rnk: 4}\ntrain:\n    seed: 1\n    seed: 2\n"
    text += "output: o\ndata:\n  sources:\n    - {format: text, path: a.txt, limit: 0}\n"
    assert full_mistakes(tmp_path, text) == [
        "r.yaml:1:8: base.model: expected text; got 3. Put it in quotes.",
        "r.yaml:4:3: adapter.mlp.rank: missing (rank of the two LoRA matrices).",
        "r.yaml:4:10: adapter.mlp.rnk: unknown key. Did you mean 'rank'?",
        "r.yaml:7:5: train.seed: given twice, first on line 6.",
        "r.yaml:11:35: data.sources.0.limit: must be at least 1; got 0.",
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [("base:\n\tmodel: m\n", "2:1"), ("a: 1\nb: *x\n", "2:4"), ("a: 1\nbc: \0", "2:5"), ("a: 1\n---\nb: 2\n", "2:1")],
)
def test_broken_yaml_has_line_and_column(text: str, place: str, tmp_path: Path) -> None:
    [message] = full_mistakes(tmp_path, text)
    assert message.startswith(f"r.yaml:{place}: not valid YAML: ")


def test_an_unknown_key_hides_no_broken_rule(tmp_path: Path) -> None:
    text = with_line(4, "train: {epochs: 1, max_steps: 2, lr: 1e-4}")
    expected = [
        "r.yaml:2: adapter.attention.<name>: unknown key",
        "r.yaml:4: train.lr: unknown key. Did you mean 'learning_rate'?",
        f"r.yaml:4: {TWICE}",
    ]
    assert_each_says(mistakes(tmp_path, text.replace("rank: 4", "rank: 4, '<name>': 2")), expected)


TWICE = "train.max_steps: … train.epochs … Give one"
HIDES_NONE = {
    "a wrong type": (
        with_line(4, "train: {epochs: 1, max_steps: 2, seed: x}"),
        ["r.yaml:4: train.seed: expected a whole number; got 'x'.", f"r.yaml:4: {TWICE}"],
    ),
    "a rule before the one that asks": (
        with_line(2, "adapter: {init: pissa, variant: 3, norms: true}"),
        [
            "r.yaml:2: adapter.variant: expected one of lora, rslora, dora; got 3.",
            "r.yaml:2: adapter.init: pissa",
        ],
    ),
    "rules between sections": (
        with_line(4, "train: {keep_best: true, log_every: 0}"),
        [
            "r.yaml:4: train.log_every: must be at least 1; got 0.",
            "r.yaml:4: train.keep_best: … validation … Set data.validation",
        ],
    ),
    "a source": (
        with_source("path: a.jsonl, format: text, unit: line, limit: 0.5, fields: {text: 3}"),
        [
            "r.yaml:3: data.sources.0.limit: expected a whole number; got 0.5.",
            "r.yaml:3: data.sources.0.fields.text: expected text; got 3. Put it in quotes.",
            "r.yaml:3: data.sources.0.unit: … .txt … Remove it",
        ],
    ),
    "an unknown key as well": (
        with_line(4, "train: {epochs: 1, max_steps: 2, seed: x, lr: 3}"),
        [
            "r.yaml:4: train.seed: expected a whole number; got 'x'.",
            "r.yaml:4: train.lr: unknown key. Did you mean 'learning_rate'?",
            f"r.yaml:4: {TWICE}",
        ],
    ),
}
"""A value that is wrong, and rules that are broken whatever it should have been."""


@pytest.mark.parametrize(("text", "messages"), HIDES_NONE.values(), ids=HIDES_NONE)
def test_a_wrong_value_hides_no_broken_rule(tmp_path: Path, text: str, messages: list[str]) -> None:
    assert_each_says(mistakes(tmp_path, text), messages)


ALONE = [
    (2, "adapter: {attention: 4}", "adapter.attention"),  # not: nothing would be trained
    (2, "adapter: {variant: dora, mlp: 4}", "adapter.mlp"),  # not: dora acts on attention and mlp
    (2, "router: {mode: tund}", "router.mode"),  # not: nothing would be trained
    (2, "router: {mode: lra, rank: 4}", "router.mode"),  # not: a rank belongs to mode lora
    (3, "data: {sources: [{path: 7, format: text}]}", "data.sources.0.path"),  # not: give exactly one of path and hub
    (3, "data: {sources: [{hub: 7, split: a, format: text}]}", "data.sources.0.hub"),  # not: a local file has none
    (3, "data: {sources: [{path: a, format: text}], leakage: drop, validation: x}", "data.validation"),
    (3, "data: {sources: [{path: a, format: text}], max_repeats: 2, language_temperature: x}", "data.language_temp"),
    (
        3,
        "data: {sources: [{path: a, format: classification, instruction: '{labels}', labels: 3}]}",
        "data.sources.0.labels",  # not: this source has no labels
    ),
    (4, "train: {scheduler: constant, warmup_ratio: x}", "train.warmup_ratio"),
    (4, "train: {keep_best: true, eval_every: x}\ndata: {sources: [{path: a, format: text}], validation: 0.1}", None),
    (4, "objective: dp\ntrain: {beta: 0.1}", "objective"),  # not: belongs to objective dpo
    (4, "hub: {repo: a/b, base_id: 3}\nbase: {model: /}", "hub.base_id"),  # not: the base is a folder
]


@pytest.mark.parametrize(("line", "text", "key"), ALONE)
def test_one_wrong_value_gives_one_message(tmp_path: Path, line: int, text: str, key: str | None) -> None:
    sections = [part.partition(":")[0] for part in text.splitlines()]
    kept = [part for part in GOOD if part.partition(":")[0] not in sections and not (line == 2 and "adapter" in part)]
    found = mistakes(tmp_path, "\n".join([*kept, text]))
    assert len(found) == 1, found
    assert f": {key or 'train.eval_every'}" in found[0]


def test_what_an_unknown_key_leaves_missing_in_its_own_section_is_not_reported_twice(tmp_path: Path) -> None:
    assert mistakes(tmp_path, with_line(2, "adapter: {atention: {rank: 4}}")) == [
        "r.yaml:2: adapter.atention: unknown key. Did you mean 'attention'?"
    ]


def test_a_file_far_too_large_is_refused_at_once(tmp_path: Path) -> None:
    began = time.process_time()
    [message] = mistakes(tmp_path, "x:\n" + "  - {a: b}\n" * 100_000)
    assert message == "r.yaml: more than 256 kB, too large for a recipe. Is it a data file?"
    assert time.process_time() - began < 5, "a YAML of this size takes a minute to read"


OVERRIDES = [
    ("train.lr=1", "override 'train.lr=1': train.lr: unknown key. Did you mean 'learning_rate'?"),
    ("train.seed=abc", "override 'train.seed=abc': train.seed: expected a whole number; got 'abc'."),
    ("train.seed", "override 'train.seed': expected key=value, such as train.max_steps=20."),
    ("=3", "override '=3': expected key=value, such as train.max_steps=20."),
    ("train..seed=3", "override 'train..seed=3': expected key=value, such as train.max_steps=20."),
    (
        "train.seed=[",
        "override 'train.seed=[': the value is not valid YAML: expected the node content, but found '<stream end>'.",
    ),
    ("train.seed=!!python/x 3", "override 'train.seed=!!python/x 3': the tag '!!python/x' is not allowed. Remove it."),
    ("output.x.y=3", "override 'output.x.y=3': output is a single value; it has no 'x'."),
    (
        "data.sources.1.path=b",
        "override 'data.sources.1.path=b': data.sources is a list of 1; name an item by its number, from 0 to 0.",
    ),
    ("adapter=null", "override 'adapter=null': adapter: expected a mapping such as {key: value}; got nothing."),
    (
        "adapter={mlp: {rank: x}}",
        "override 'adapter={mlp: {rank: x}}': adapter.mlp.rank: expected a whole number; got 'x'.",
    ),
    (
        "adapter.attention=null",
        "r.yaml:2: adapter: nothing would be trained. … rank … router.mode … tuned",
    ),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_a_wrong_override_is_quoted(tmp_path: Path, override: str, message: str) -> None:
    assert_each_says(mistakes(tmp_path, "\n".join(GOOD), override), [message])


FILES = [
    (b"", "r.yaml: expected a recipe, a mapping such as `base: {model: …}`; it is empty."),
    (b"# only a comment\n", "r.yaml: expected a recipe, a mapping such as `base: {model: …}`; it is empty."),
    (b"- a\n- b\n", "r.yaml: expected a recipe, a mapping such as `base: {model: …}`; it holds a list."),
    (b"42\n", "r.yaml: expected a recipe, a mapping such as `base: {model: …}`; it holds 42."),
    (b"base: \xff\n", "r.yaml: not UTF-8 text (byte 6). Save it as UTF-8."),
    ("base: {}".encode("utf-16"), "r.yaml: not UTF-8 text (byte 0). Save it as UTF-8."),
    (b"base:\n\tmodel: m\n", None),
    (b"base: {model: m\n", None),
    (b"base: *other\n", "r.yaml:1: not valid YAML: found undefined alias 'other'."),
    (b"a: 1\n---\nb: 2\n", None),
    (b"[" * 1000, "r.yaml: nested too deeply for a recipe."),
    (b"a: &x [*x]\n", "r.yaml:1: nested too deeply or too large for a recipe."),
    (b"a: \x00\n", None),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_file_that_is_no_recipe_gives_one_message(tmp_path: Path, content: bytes, message: str | None) -> None:
    found = mistakes(tmp_path, content)
    assert len(found) == 1
    if message is None:
        assert found[0].startswith("r.yaml:")
        assert "not valid YAML: " in found[0]
    else:
        assert found == [message]


def test_tabs_are_explained(tmp_path: Path) -> None:
    [message] = mistakes(tmp_path, "base:\n\tmodel: m\n")
    assert message.startswith("r.yaml:2: not valid YAML: ")
    assert message.endswith("Indent with spaces, not tabs.")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [ls]", "!mine {a: 1}", "!!binary aGk=", "!!set {a}"])
def test_no_tag_is_executed(tmp_path: Path, tag: str) -> None:
    found = mistakes(tmp_path, with_line(5, f"output: {tag}"))
    assert found[0].startswith("r.yaml:5: output: the tag ")
    assert found[0].endswith(" is not allowed. Remove it.")


def test_merge_keys_and_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    found = mistakes(tmp_path, with_line(4, "train: {<<: {seed: 1}, [a]: 2}"))
    assert found == [
        "r.yaml:4: train.<<: merge keys (<<) are not supported. Write the settings themselves.",
        "r.yaml:4: train: a key must be plain text.",
    ]


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    found = mistakes(tmp_path, with_line(4, '"\\ud800": 3') + 'router: {mode: "\\udfff"}')
    assert found == [
        "r.yaml:4: a key must be plain text.",
        "r.yaml:6: router.mode: expected text that can be written as UTF-8; got '\\udfff'.",
    ]


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "swahili.yaml").touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "swahil.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'swahil.yaml'}: no such recipe. Did you mean '{tmp_path / 'swahili.yaml'}'?"
    )


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a folder\. Give a recipe file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("path: a.jsonl, format: text, delimiter: ','", "delimiter: is for .csv and .tsv files … Remove it"),
        ("path: a.txt, format: text, quoting: true", "quoting: is for .csv and .tsv files … Remove it"),
        ("hub: a/b, format: text, rows_under: data", "rows_under: is for .jsonl and .ndjson and .json files"),
        ("path: a.csv, format: text, delimiter: ';;'", "delimiter"),
        ("path: a.csv, format: text, delimiter: '\"'", "delimiter: cannot be a quotation mark"),
        ("path: a.csv.gz, format: text, unit: line", "unit: divides .txt files"),
        ("path: '${X}/a.csv', format: text", "path: ${X} is not replaced in a recipe"),
        ("path: '~nobody-here/a.csv', format: text", "path: no home folder is known for the `~`"),
    ],
)
def test_keys_that_do_not_fit_the_kind_of_file_are_refused(tmp_path: Path, source: str, message: str) -> None:
    assert_each_says(mistakes(tmp_path, with_source(source)), [f"r.yaml:3: data.sources.0.{message}"])


def test_keys_that_fit_the_kind_of_file_are_accepted(tmp_path: Path) -> None:
    for source in (
        "path: a, format: text, delimiter: ';', quoting: false",
        "path: a.json.gz, format: text, rows_under: a.b",
    ):
        (tmp_path / "r.yaml").write_text(with_source(source))
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(
        with_source("path: a.csv, format: classification, instruction: 'Is ${text} right?'")
    )
    load_recipe(tmp_path / "r.yaml")
