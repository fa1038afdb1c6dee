"""The recipes that come with lola_ft (their place, their purposes, copies to start from), and the JSON schema."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from lola_ft.errors import RecipeError
from lola_ft.files import write_text
from lola_ft.recipe.keys import suggest_word
from lola_ft.recipe.schema import Recipe

SCHEMA_FILE = "schema.json"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class BundledRecipe:
    """A recipe file. Its first comment is the command that runs it, its second comment describes its purpose."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def purpose(self) -> str:
        """The first sentence of the recipe's description."""
        comments = [line.removeprefix("#").strip() for line in self.text.splitlines() if line.startswith("#")]
        sentence, _, _ = " ".join(comments[comments.index("") + 1 :]).partition(". ")
        return sentence.rstrip(".")

    @property
    def data_files(self) -> list[str]:
        """The bundled sample files that the recipe names, such as `recipes/data/qa_sample.jsonl`."""
        named = dict.fromkeys(re.findall(r"recipes/data/[\w.-]+\w", self.text))
        return [path for path in named if (self.path.parents[1] / path).is_file()]


def recipes_folder() -> Path:
    """Return the folder of recipes: inside the installed package, or at the top of a checkout."""
    packed = _PACKAGE / "recipes"
    return packed if packed.is_dir() else _PACKAGE.parent / "recipes"


def bundled_recipes() -> dict[str, BundledRecipe]:
    """Return all recipes by name; raises RecipeError if the folder with them is missing."""
    folder = recipes_folder()
    found = {path.stem: BundledRecipe(path) for path in sorted(folder.glob("*.yaml"))}
    if not found:
        raise RecipeError(f"{folder}: the bundled recipes are missing. Install lola_ft again, or run it in a checkout.")
    return found


def find_recipe(name: str) -> BundledRecipe:
    """Find a recipe by its name, or raise a RecipeError that lists them."""
    recipes = bundled_recipes()
    wanted = Path(name).stem if name.endswith(".yaml") else name
    if wanted not in recipes:
        hint = suggest_word(wanted, list(recipes)) or f" Choose one of {', '.join(recipes)}."
        raise RecipeError(f"there is no recipe '{name}'.{hint}")
    return recipes[wanted]


def copy_recipe(name: str, out: str | Path = ".") -> list[Path]:
    """Copy a recipe, its samples and the schema to `OUT/recipes/`, or nothing at all.

    Paths in the copy begin with OUT and its command is `lola-ft train`, so the copy runs from the current folder.
    """
    recipe = find_recipe(name)
    root = recipe.path.parents[1]
    names = [f"recipes/{recipe.path.name}", *recipe.data_files]
    if (recipe.path.parent / SCHEMA_FILE).is_file():
        names.append(f"recipes/{SCHEMA_FILE}")
    texts = {Path(out) / name: (root / name).read_text(encoding="utf-8") for name in names}
    copied = Path(out) / names[0]
    texts[copied] = _moved(texts[copied], Path(out))
    for target, text in texts.items():
        if target.exists() and target.read_text(encoding="utf-8") != text:
            raise RecipeError(f"{target}: already exists and differs. Move it away, or choose another --out.")
    for target, text in texts.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, text)
        except OSError as error:
            raise RecipeError(f"{target}: cannot be written: {error.strerror}.") from None
    return list(texts)


_BUNDLED_PATH = re.compile(r"(?<![\w./])recipes/[\w./-]+")


def _moved(text: str, out: Path) -> str:
    """Return a recipe's text with its paths and command adapted to a copy in another folder.

    The shell's quotes are also valid quotes in YAML.
    """
    text = text.replace("# python finetune.py ", "# lola-ft train ", 1)
    return text if out == Path() else _BUNDLED_PATH.sub(lambda path: shlex.quote(f"{out.as_posix()}/{path[0]}"), text)


def schema_text() -> str:
    """Return the JSON schema of recipes, which lets editors complete keys; `recipes/schema.json` is this text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
