"""Every recipe's data section, carried out on the bundled sample that has the same columns."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lola_ft.recipe import load_recipe
from lola_ft.recipe.bundled import bundled_recipes, recipes_folder
from lola_ft.training.dataset import prepare

REPOSITORY = Path(__file__).parents[2]
EOS = 5
ALPACA = {"instruct", "instruct_olmoe", "instruct_qwen3_moe", "instruct_mixtral", "baseline_dense"}
# What a recipe's first answer and languages are, read off its sample by eye.
EXPECTED = {
    "instruct": ("A young tree, a spade and water.", {"en"}),
    "instruct_olmoe": ("A young tree, a spade and water.", {"en"}),
    "instruct_qwen3_moe": ("A young tree, a spade and water.", {"en"}),
    "instruct_mixtral": ("A young tree, a spade and water.", {"en"}),
    "baseline_dense": ("A young tree, a spade and water.", {"en"}),
    "instruct_multilingual": ("It replaces what the body lost during the night.", {"eng", "swa", "yor", "hin", "arb"}),
    "translation": ("ढोका खुला छ।", {"ne", "en"}),
    "nli": ("yes", {"en", "ur", "sw"}),
    "question_answering": ("1871", {"en", "sw", "de", "ar", "hi", "zh"}),
    "summarisation": ("Neighbours dug deeper and found water in the dry village well.", {"en", "sw", "hi", "ar"}),
    "classification": ("politics", {"en", "sw", "de", "hi", "ar"}),
    "preference_dpo": ("A week has seven days.", {"en", "sw", "de"}),
    "preference_kto": ("A week has seven days.", {"en", "sw", "de"}),
    "low_resource_text": (
        "Mto ni maji yanayotiririka kutoka milimani hadi ziwani au baharini. Mito hutoa maji ya kunywa na ya "
        "kumwagilia mashamba.\n\nMito mikubwa hupitika kwa mashua.",
        {"sw"},
    ),
}


def test_every_recipe_for_the_full_model_has_a_sample() -> None:
    assert set(EXPECTED) == set(bundled_recipes()) - {"demo"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_data_section_runs_on_its_sample(name: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    sample = f"recipes/data/{'alpaca' if name in ALPACA else name}_sample.jsonl"
    assert (REPOSITORY / sample).is_file()
    path = recipes_folder() / f"{name}.yaml"
    written = load_recipe(path)
    local = [f"data.sources.{place}.path={sample}" for place, source in enumerate(written.data.sources) if source.hub]
    assert local or written.data.sources[0].path == sample
    recipe = load_recipe(path, [*local, "data.validation=0", "data.leakage=error", "data.overlong=error"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    data = prepare(recipe.data.model_copy(update={"max_length": 2048}), tokenizer, seed=0)
    rows = sum(1 for line in (REPOSITORY / sample).open(encoding="utf-8") if line.strip())
    answer, languages = EXPECTED[name]
    assert data.train.report.total.kept == rows * len(written.data.sources)
    assert data.bad_rows is None or not data.bad_rows.counts
    assert languages <= set(data.train.report.languages)
    first = data.train.dataset[0]
    learned = [label for label in first["labels"] if label != -100]
    assert learned[-1] == EOS
    start = 1 if name == "low_resource_text" else 0  # nothing precedes a text's first token, so it is not learned
    assert tokenizer.decode(learned[: learned.index(EOS)]).strip() == answer[start:]


PREFERENCE = ("preference_dpo", "preference_kto")
COMMAND = re.compile(r"#   lola-ft preview recipes/(\w+)\.yaml ?(.*)")
COMMANDS = [found.groups() for recipe in bundled_recipes().values() for found in COMMAND.finditer(recipe.text)]
AS_THEY_ARE = [(name, "") for name in ("question_answering", "summarisation", "classification", *PREFERENCE)]


def test_recipes_of_the_hub_say_how_to_try_them_on_their_sample() -> None:
    assert {name for name, overrides in COMMANDS if overrides} == ALPACA | {
        "instruct_multilingual",
        "translation",
        "nli",
        "low_resource_text",
    }


@pytest.mark.parametrize(("name", "overrides"), [*COMMANDS, *AS_THEY_ARE])
def test_the_commands_that_recipes_name_work(
    name: str, overrides: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    recipe = load_recipe(f"recipes/{name}.yaml", [word for text in overrides.split() for word in expanded(text)])
    data = prepare(recipe.data, AutoTokenizer.from_pretrained(tiny_base), recipe.train.seed)
    assert data.validation is not None
    assert data.train.report.total.kept > 4


def expanded(word: str) -> list[str]:
    """A word as bash expands it: `a{0,1}b` is two."""
    found = re.match(r"(.*)\{([\d,]+)\}(.*)", word)
    return [f"{found[1]}{part}{found[3]}" for part in found[2].split(",")] if found else [word]


def test_the_multilingual_recipe_gives_small_languages_more(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    sample = "recipes/data/instruct_multilingual_sample.jsonl"
    recipe = load_recipe("recipes/instruct_multilingual.yaml", [f"data.sources.0.path={sample}", "data.validation=0"])
    shares = prepare(recipe.data, AutoTokenizer.from_pretrained(tiny_base), seed=0).mix.shares
    assert shares["eng"].examples < shares["eng"].available
    assert sum(share.examples > share.available for share in shares.values()) >= 1
