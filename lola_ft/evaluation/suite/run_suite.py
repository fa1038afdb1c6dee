"""The verb `lola-ft evaluate --suite`. Each task's result is kept, so that a stopped evaluation can continue."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from lola_ft.console import Console
from lola_ft.data import PromptTemplate
from lola_ft.errors import UserError, first_line
from lola_ft.evaluation.ask_models import Opening, ask_each, how_loaded, refuse_needless_base, refuse_twice
from lola_ft.evaluation.suite.benchmarks import SUITES, Chosen, choose, resolve
from lola_ft.evaluation.suite.harness import harness_model, harness_of_other, manager_for, require_harness, run_task
from lola_ft.evaluation.suite.other_model import find_other_model
from lola_ft.evaluation.suite.suite_tables import plan_table, result_table
from lola_ft.files import check_folder_target, sha256_of, write_text
from lola_ft.open_model import OpenModel

Results = dict[str, dict[str, Any]]
"""The harness's results, by task."""


@dataclass(frozen=True)
class SuiteOptions:
    """Options of the suite, as given on the command line.

    Attributes:
        tasks, languages: Selected tasks and languages; empty for all.
        limit: Most documents per task; None for all.
        shots: Number of examples before each question.
        include_path: A folder with the user's own tasks.
        batch_size: Texts that the model reads at a time.
    """

    suite: str
    tasks: Sequence[str] = ()
    languages: Sequence[str] = ()
    limit: int | None = None
    shots: int = 0
    include_path: str | None = None
    batch_size: int = 8


def evaluate_suite(
    models: Sequence[str],
    options: SuiteOptions,
    out: str | None = None,
    base: str | None = None,
    quantization: str = "auto",
    console: Console | None = None,
) -> dict[str, Results]:
    """Run the harness on every model; prints a table and keeps one JSON file per task.

    Args:
        models: Bases, runs, adapters, merged models, or any language model that transformers can load by itself.
        out: Folder for the results, which a later call reuses; None means `reports/SUITE`.

    Raises:
        UserError: The harness is missing, there is nothing to run, or tasks failed. Other results are kept.
    """
    console, out = console or Console(), out or f"reports/{options.suite}"
    check_folder_target(out)
    wanted = choose(options.suite, list(options.tasks), list(options.languages))
    version = require_harness()
    manager = manager_for([one.task for one in wanted], options.include_path)
    chosen, missing = resolve(wanted, set(manager.all_tasks))
    _refuse_unknown([one.wanted for one in wanted if not one.benchmark and one.wanted in missing], manager, options)
    console.print(plan_table(chosen, missing))
    if not chosen:
        raise UserError(f"lm_eval {version} has none of the tasks: {', '.join(missing)}.")
    common = {"lm_eval": version, "limit": options.limit, "shots": options.shots}
    own_tasks = sorted(Path(options.include_path).glob("**/*.y*ml")) if options.include_path else None
    common |= {"own_tasks": None if own_tasks is None else sha256_of(*own_tasks)}
    failures = list[str]()

    def run_tasks(name: str, identity: dict[str, Any], load: Callable[[], Any]) -> Results:
        folder = Path(out) / _slug(name)
        results, failed = _run_all(load, chosen, manager, options, folder, common | identity, console)
        failures.extend(f"{name}: {task} ({reason})" for task, reason in failed.items())
        return results

    def ask(opened: OpenModel, _: PromptTemplate) -> Results:
        load = partial(harness_model, opened, options.batch_size)
        return run_tasks(opened.subject.name, _identity(opened), load)

    refuse_twice(models)
    others = {name: other for name in models if (other := find_other_model(name))}
    if others and quantization == "nf4":
        raise UserError(
            f"--quantization nf4 is only for models that `lola-ft families` lists, and {next(iter(others))} is not "
            "one. Leave it out."
        )
    own = [name for name in models if name not in others]
    refuse_needless_base(own, base)
    found, facts = ask_each(own, Opening(base, quantization, "plain"), ask, console)
    by_name, about = dict(zip(own, found, strict=True)), dict(zip(own, facts, strict=True))
    for name, other in others.items():
        console.print(f"{name} ({other.model_type}, another architecture) …")
        identity = other.identity()
        by_name[name] = run_tasks(name, identity, partial(harness_of_other, other, options.batch_size))
        about[name] = {"model": name, "kind": other.model_type, **identity}
    by_model, facts = {name: by_name[name] for name in models}, [about[name] for name in models]
    console.print(result_table(by_model, chosen))
    report = {"models": facts, "settings": common, "missing": missing, "results": by_model}
    write_text(Path(out) / f"{options.suite}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if failures:
        failed = "\n  ".join(failures)
        raise UserError(f"{len(failures)} tasks failed; run the same command again to repeat only these:\n  {failed}")
    return by_model


def _refuse_unknown(tasks: list[str], manager: Any, options: SuiteOptions) -> None:
    """Raise UserError for a task that neither the suite nor the harness has, probably a typing mistake."""
    if tasks:
        near = get_close_matches(tasks[0], [*SUITES[options.suite], *manager.all_tasks], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"--tasks: neither {options.suite} nor the harness has a task '{tasks[0]}'.{hint}")


def _run_all(
    load: Callable[[], Any],
    chosen: list[Chosen],
    manager: Any,
    options: SuiteOptions,
    folder: Path,
    settings: dict[str, Any],
    console: Console,
) -> tuple[Results, dict[str, str]]:
    """Return the results of a model's tasks, read from files if kept, and the reasons of failed tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    results, failed, model = Results(), dict[str, str](), None
    on_terminal = Console(stderr=True)
    for number, one in enumerate(chosen, start=1):
        file = folder / f"{one.task}.json"
        kept = _kept(file, settings)
        if kept is None:
            if on_terminal.is_terminal:  # printed above the harness's own bar, which shows the task's time left
                on_terminal.print(f"{one.task}, task {number} of {len(chosen)}")
            model = model or load()
            try:
                kept = run_task(model, one.task, manager, options.limit, options.shots)
            except Exception as error:  # one missing dataset must not lose the other tasks
                failed[one.task] = first_line(error)[:200]
                continue
            written = {"task": one.task, "settings": settings, **kept}
            write_text(file, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        else:
            console.print(f"{one.task}: already evaluated, so the result is read from {file}")
        results[one.task] = kept
    return results, failed


def _kept(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return a task's kept result for the same settings; None if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: found[key] for key in ("metrics", "documents", "version")}
        return kept if found["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(opened: OpenModel) -> dict[str, Any]:
    """Return facts that identify a model: base weights, adapter files, quantisation and dtype."""
    adapter = opened.subject.adapter
    files = sha256_of(*sorted(adapter.glob("adapter_*"))) if adapter else None
    return how_loaded(opened) | {"adapter": files}


def _slug(name: str) -> str:
    """Return a folder name for a model; a hash keeps similar names apart."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[-60:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
