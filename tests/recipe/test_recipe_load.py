"""A good recipe is read with its defaults and overrides and written back; the recipes of this repository are good."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lola_ft.errors import RecipeError
from lola_ft.recipe import Recipe, load_recipe, render_recipe
from lola_ft.recipe.allowed_values import OPTIMIZERS, SCHEDULERS
from lola_ft.recipe.document import parse_document
from lola_ft.recipe.keys import all_keys, describe_key
from lola_ft.recipe.overrides import apply_overrides
from lola_ft.recipe.schema import GroupLora, Section

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))

MINIMAL = """\
base: {model: some/model}
adapter: {experts: {rank: 8}}
data:
  sources:
    - {path: a.jsonl, format: alpaca, language: no}
output: runs/x
"""

DESIGN = """\
base:
  model: dice-research/lola_v1
  revision: main
  quantization: nf4
  dtype: bfloat16
adapter:
  attention: {rank: 16}
  mlp: {rank: 16}
  experts: {rank: 8, select: all}
  alpha: 32
  dropout: 0.05
  variant: lora
router:
  mode: frozen
  aux_loss: 0.0
data:
  template: alpaca
  sources:
    - {path: data/sw.jsonl, format: alpaca, language: sw}
    - {hub: some/dataset, split: train, format: prompt_completion, language_column: lang}
  language_temperature: 1.0
  max_length: 1024
  overlong: drop
  packing: true
  validation: 0.02
train:
  epochs: 1
  micro_batch_size: 4
  grad_accum_steps: 4
  learning_rate: 1.0e-4
  scheduler: cosine
  warmup_ratio: 0.03
  optimizer: adamw_8bit
  gradient_checkpointing: true
  seed: 0
  save_every: 200
  keep: 2
  eval_every: 200
output: runs/instruct-multilingual
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return path


def load_text(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "text.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def test_a_minimal_recipe_gets_the_defaults_of_the_full_one(minimal: Path, tmp_path: Path) -> None:
    recipe, full = load_recipe(minimal), load_text(tmp_path, DESIGN)
    assert recipe.train == full.train
    assert recipe.router == full.router
    assert recipe.base.model_dump(exclude={"model"}) == full.base.model_dump(exclude={"model"})
    assert recipe.data.model_dump(exclude={"sources", "validation"}) == full.data.model_dump(
        exclude={"sources", "validation"}
    )
    assert recipe.data.validation == 0.0
    assert (recipe.adapter.attention, recipe.adapter.mlp) == (None, None)
    assert recipe.adapter.experts is not None
    assert recipe.adapter.experts.select == "all"
    assert recipe.data.sources[0].language == "no"  # Norwegian, not a truth value


def test_a_recipe_cannot_be_changed(minimal: Path) -> None:
    with pytest.raises(ValidationError):
        load_recipe(minimal).train.seed = 3


@pytest.mark.parametrize("spelling", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4"])
def test_numbers_are_read_as_users_write_them(tmp_path: Path, spelling: str) -> None:
    recipe = load_text(tmp_path, MINIMAL + f"train: {{learning_rate: {spelling}}}\n")
    assert recipe.train.learning_rate == 1e-4
    assert load_text(tmp_path, MINIMAL, f"train.learning_rate={spelling}").train.learning_rate == 1e-4


def test_a_whole_number_may_stand_for_a_decimal(tmp_path: Path) -> None:
    recipe = load_text(tmp_path, MINIMAL, "train.epochs=2", "data.validation=0", "adapter.alpha=16")
    assert (recipe.train.epochs, recipe.data.validation, recipe.adapter.alpha) == (2.0, 0.0, 16.0)
    assert isinstance(recipe.train.epochs, float)


def test_byte_order_mark_line_ends_and_anchors_are_fine(tmp_path: Path) -> None:
    text = MINIMAL.replace("{experts: {rank: 8}}", "{mlp: &group {rank: 8}, attention: *group}")
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    adapter = load_recipe(path).adapter
    assert adapter.attention == adapter.mlp
    assert adapter.mlp is not None
    assert adapter.mlp.rank == 8


def test_overrides_reach_every_kind_of_place(minimal: Path) -> None:
    recipe = load_recipe(
        minimal,
        [
            "adapter.experts=null",
            "adapter.mlp.rank=4",
            "router={mode: tuned}",
            "data.sources.0.path=b.jsonl",
            "train.seed=1",
            "train.seed=2",
            "output=runs/a=b",
        ],
    )
    assert recipe.adapter.experts is None
    assert recipe.adapter.mlp is not None
    assert recipe.adapter.mlp.rank == 4
    assert recipe.router.mode == "tuned"
    assert recipe.data.sources[0].path == "b.jsonl"
    assert recipe.train.seed == 2
    assert recipe.output == "runs/a=b"


def test_overrides_leave_the_files_data_alone() -> None:
    data = {"train": {"epochs": 3}}
    assert apply_overrides(data, ["train.max_steps=20"]).data == {"train": {"max_steps": 20}}
    assert data == {"train": {"epochs": 3}}


def test_the_schema_is_also_json_schema() -> None:
    properties = Recipe.model_json_schema()["properties"]
    assert list(properties) == ["objective", "base", "adapter", "router", "data", "train", "guards", "hub", "output"]


def test_overriding_max_steps_takes_the_place_of_the_files_epochs(tmp_path: Path) -> None:
    with_epochs = MINIMAL + "train: {epochs: 3}\n"
    assert load_text(tmp_path, with_epochs, "train.max_steps=20").train.max_steps == 20
    assert load_text(tmp_path, with_epochs, "train.max_steps=null").train.epochs == 3
    with_steps = MINIMAL + "train: {max_steps: 20}\n"
    recipe = load_text(tmp_path, with_steps, "train.epochs=3")
    assert (recipe.train.max_steps, recipe.train.epochs) == (None, 3.0)
    with pytest.raises(RecipeError, match=r"override 'train.max_steps=20': .*both say when to stop"):
        load_text(tmp_path, MINIMAL, "train.epochs=3", "train.max_steps=20")


def test_a_constant_schedule_has_no_warm_up_of_its_own_accord(tmp_path: Path) -> None:
    assert load_text(tmp_path, MINIMAL, "train.scheduler=constant").train.warmup_ratio == 0.0


ROUND_TRIPS = [
    (),
    ("train.max_steps=20",),
    ("train.scheduler=constant",),
    ("data.validation=[{path: v.json, format: text}]",),
    ("data.sources.0={hub: a/b, format: text, fields: {text: content}, revision: '1e5'}", "data.overlong=split"),
    ("data.sources.0={path: c.csv, format: classification, labels: {0: no, '1': 'yes'}, instruction: 'Is {text}?'}",),
    ("data.sources.0={path: t.tsv, format: translation, source_language: en, target_language: no, limit: 3}",),
    ("data.language_temperature=3", "data.max_repeats=2", "data.max_per_language=50", "data.deduplicate=true"),
    ("output='a: b # c'", "base.model='null'", "base.revision='007'", "data.template='2024-01-01'"),
    ('output="line\\nbreak \\u2028 \\x07 \\U0001F600 "',),
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS)
def test_a_rendered_recipe_reads_back_as_itself(minimal: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(minimal, overrides)
    rendered = render_recipe(recipe)
    again = load_text(tmp_path, rendered)
    assert again == recipe
    assert render_recipe(again) == rendered


def test_a_rendered_recipe_shows_every_default(minimal: Path) -> None:
    rendered = parse_document(render_recipe(load_recipe(minimal))).data
    assert rendered["data"]["max_length"] == 1024
    assert rendered["train"]["optimizer"] == "adamw_8bit"
    assert set(rendered["train"]) == set(load_recipe(minimal).train.model_dump()) - {
        "max_steps",
        "beta",
        "loss_type",
        "reference",
        "reference_pass",
        "early_stopping",
        "energy",
    }


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
# A path's `$` and `~` are the shell's: refused or replaced.
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$~"), min_size=1, max_size=30))
@example("\x85")
@example("'")
def test_any_text_survives_rendering(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    recipe = Recipe.model_validate(parse_document(MINIMAL).data | {"output": text})
    assert load_text(tmp_path_factory.getbasetemp(), render_recipe(recipe)) == recipe


YAML_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(all_keys()), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.text("abc:-{}[]&*!|>'\"#%@,? \n\t01.~<", max_size=40))
def test_any_text_is_a_recipe_or_gives_one_clean_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    str(caught.value).encode()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.dictionaries(st.sampled_from(["base", "adapter", "data", "train", "router", "output"]), YAML_LIKE))
def test_any_mapping_is_a_recipe_or_gives_one_clean_error(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert all(line.startswith(f"{path}:") for line in str(caught.value).splitlines())


@settings(max_examples=60, deadline=None)
@given(override=st.text(max_size=20) | st.builds("{}={}".format, st.sampled_from(all_keys()), st.text(max_size=8)))
def test_any_override_gives_a_recipe_or_one_clean_error(
    tmp_path_factory: pytest.TempPathFactory, override: str
) -> None:
    try:
        load_text(tmp_path_factory.getbasetemp(), MINIMAL, override)
    except RecipeError as error:
        str(error).encode()


def test_the_folder_of_recipes_is_not_empty() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_valid(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_text(tmp_path, render_recipe(recipe)) == recipe
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# python finetune.py recipes/{path.name}"


def test_every_key_is_described() -> None:
    for key in all_keys():
        assert describe_key(key.split(".")), key


def test_every_section_is_closed_frozen_and_strict() -> None:
    sections = [*Section.__subclasses__(), *GroupLora.__subclasses__()]
    assert len(sections) == 13
    for section in sections:
        config = section.model_config
        assert (config["extra"], config["frozen"], config["strict"]) == ("forbid", True, True)


@pytest.mark.parametrize(
    ("names", "module", "enum"),
    [(SCHEDULERS, "trainer_utils.py", "SchedulerType"), (OPTIMIZERS[1:], "training_args.py", "OptimizerNames")],
)
def test_names_are_those_of_the_installed_transformers(names: tuple[str, ...], module: str, enum: str) -> None:
    """Read from its source, since importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / module).read_text(encoding="utf-8"))
    [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == enum]
    values = {
        node.value.value for node in found.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert set(names) == values
