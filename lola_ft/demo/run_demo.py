"""The demo: the whole job on embedded data, from an empty folder to a table of results.

It builds the nano base, runs the two commands of a user (fine-tune and merge), and asks base, adapter and merged model
for the language of sentences that none of them has seen.
"""

import json
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import lola_ft
from lola_ft.console import Console
from lola_ft.demo.accuracy_picture import draw_accuracy
from lola_ft.demo.accuracy_tables import CONFUSED_SHOWN, accuracy_table, confusion_table
from lola_ft.demo.language_task import build_rows, write_rows
from lola_ft.errors import UserError
from lola_ft.evaluation import ExactMatch, best_constant_answer, exact_match_by_language
from lola_ft.file_names import ADAPTER_FOLDER, LOSS_PLOT, MERGED_FOLDER, RECIPE_FILE
from lola_ft.nano import build_nano
from lola_ft.nano.declaration import load_declarations
from lola_ft.quantization import audit
from lola_ft.recipe import Recipe, load_recipe

TRAIN_PER_LANGUAGE, TEST_PER_LANGUAGE = 220, 12
TEST_FILE = "test.jsonl"
PICTURE = "languages.png"
_LONGEST_ANSWER = 10
"""Most tokens of an answer; the longest name of a language has fewer."""


def run_demo(recipe_path: str = "recipes/demo.yaml") -> None:
    """Run all stages and print the results; raises UserError if the output folder holds anything but a demo's run."""
    if not Path(recipe_path).is_file() or not Path("finetune.py").is_file():
        raise UserError(f"{recipe_path}: not found. Run the demo in a checkout of lola_ft, or give the recipe's path.")
    recipe = load_recipe(recipe_path)
    base, run = Path(recipe.base.model), Path(recipe.output)
    console, seconds = Console(), dict[str, float]()
    _make_room(run, recipe)
    with _stage("base", "The nano base", console, seconds):
        build_nano(base)
        rows = _write_task(recipe)
    with _stage("fine-tune", "Fine-tuning in 4 bit", console, seconds):
        _command(console, "finetune.py", recipe_path)
    with _stage("merge", "Merging", console, seconds):
        _command(console, "merge.py", str(run))
    with _stage("evaluate", "Asking about held-out sentences", console, seconds):
        results, sizes = _evaluate(base, run, rows)
    console.print(accuracy_table(results, load_declarations()))
    console.print(confusion_table(results["after"]))
    answer, share = best_constant_answer(rows)
    ended = ", ".join(f"{name} {result.stopped_share:.1%}" for name, result in results.items())
    constant = f"Always answering '{answer}', the best constant answer, would be right in {share:.1%}."
    console.print(f"{constant} Answers that the model ended by itself: {ended}.")
    console.print(_size_and_time(sizes, seconds))
    picture = draw_accuracy(results["after"], load_declarations(), run / PICTURE)
    adapter, merged = run / ADAPTER_FOLDER, run / MERGED_FOLDER
    console.print(f"Base {base}, adapter {adapter}, merged model {merged}.\nPictures {run / LOSS_PLOT}, {picture}.")
    summary: dict[str, Any] = {name: result.as_dict() for name, result in results.items()}
    summary |= {"best_constant": {"answer": answer, "accuracy": share}, "bytes": sizes, "seconds": seconds}
    summary["most_confused"] = results["after"].most_confused(CONFUSED_SHOWN)
    (run / "demo.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_room(run: Path, recipe: Recipe) -> None:
    """Remove the run of an earlier demo; raises UserError if the folder holds anything else."""
    if not run.exists() or not any(run.iterdir()):
        return
    earlier = run / RECIPE_FILE
    if not earlier.is_file() or load_recipe(earlier).base.model != recipe.base.model:
        raise UserError(f"{run}: holds something other than a run of the demo. Move it away first.")
    shutil.rmtree(run)


def _write_task(recipe: Recipe) -> list[dict[str, str]]:
    """Write the training rows to the recipe's path and the test rows beside them; returns the test rows."""
    source = recipe.data.sources[0].path
    assert source is not None, "the demo's recipe trains on a local file"
    train, test = build_rows(load_declarations(), TRAIN_PER_LANGUAGE, TEST_PER_LANGUAGE)
    write_rows(train, Path(source))
    write_rows(test, Path(source).with_name(TEST_FILE))
    return [asdict(row) for row in test]


def _command(console: Console, script: str, argument: str) -> None:
    """Run one of the two scripts like a user, but in this process: loading the libraries again takes many seconds."""
    console.print(f"$ python {script} {shlex.quote(argument)}")
    own, sys.argv = sys.argv, [script, argument]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:  # the script has said why
            raise
    finally:
        sys.argv = own


def _evaluate(base: Path, run: Path, rows: list[dict[str, str]]) -> tuple[dict[str, ExactMatch], dict[str, int]]:
    """Return the exact match before, after (adapter on the 4-bit base) and merged, and the base's bytes."""
    tokenizer = AutoTokenizer.from_pretrained(run / ADAPTER_FOLDER)
    results: dict[str, ExactMatch] = {}
    sizes = {}

    def ask(name: str, model: Any) -> None:
        results[name] = exact_match_by_language(model, tokenizer, rows, max_new_tokens=_LONGEST_ANSWER)

    dense = lola_ft.load_base(base, None, torch.float32, quiet=True)
    sizes["float32"] = audit(dense).total_bytes
    ask("before", dense)
    quantised = lola_ft.load_base(base, "nf4", torch.float32, quiet=True)
    sizes["nf4"] = audit(quantised).total_bytes
    ask("after", lola_ft.load_adapter(quantised, run / ADAPTER_FOLDER))
    ask("merged", lola_ft.load_base(run / MERGED_FOLDER, None, torch.float32, quiet=True))
    return results, sizes


def _size_and_time(sizes: dict[str, int], seconds: dict[str, float]) -> str:
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"The base takes {sizes['float32']:,} bytes in float32 and {sizes['nf4']:,} in 4 bit "
        f"({sizes['nf4'] / sizes['float32']:.0%}).\nTime: {times}."
    )


@contextmanager
def _stage(name: str, title: str, console: Console, seconds: dict[str, float]) -> Iterator[None]:
    console.rule(title, align="left")
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 1)
