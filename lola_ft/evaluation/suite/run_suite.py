"""The verb `lola-ft evaluate --suite`. Each task's result is kept, so that a stopped run can continue."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lola_ft.console import Console
from lola_ft.data import PromptTemplate
from lola_ft.errors import UserError, first_line
from lola_ft.evaluation.ask_models import Opening, ask_each, how_loaded
from lola_ft.evaluation.suite.benchmarks import SUITES, Chosen, choose, resolve
from lola_ft.evaluation.suite.harness import harness_model, manager_for, require_harness, run_task
from lola_ft.evaluation.suite.suite_tables import plan_table, result_table
from lola_ft.files import check_folder_target, sha256_of, write_text
from lola_ft.open_model import OpenModel

Results = dict[str, dict[str, Any]]
"""What the harness said, by task."""


@dataclass(frozen=True)
class SuiteOptions:
    """Options of the suite, as given on the command line.

    Attributes:
        tasks, languages: A part of the suite; empty for all.
        limit: Documents of each task; None for all.
        shots: Examples in front of each question.
        include_path: A folder with tasks of the user's own.
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
    """Run the harness on every model; print a table, keep one JSON file a task.

    Args:
        out: Folder for the results, which a later call reads; `reports/SUITE` if left out.

    Raises:
        UserError: The harness is missing, nothing to run, or tasks that failed; those that did not are kept.
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

    def ask(opened: OpenModel, _: PromptTemplate) -> Results:
        settings = common | _identity(opened)
        folder = Path(out) / _slug(opened.subject.name)
        results, failed = _run_all(opened, chosen, manager, options, folder, settings, console)
        failures.extend(f"{opened.subject.name}: {task} ({reason})" for task, reason in failed.items())
        return results

    found, facts = ask_each(models, Opening(base, quantization, "plain"), ask, console)
    by_model = dict(zip(models, found, strict=True))
    console.print(result_table(by_model, chosen))
    report = {"models": facts, "settings": common, "missing": missing, "results": by_model}
    write_text(Path(out) / f"{options.suite}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if failures:
        failed = "\n  ".join(failures)
        raise UserError(f"{len(failures)} tasks failed; run the same command again to repeat only these:\n  {failed}")
    return by_model


def _refuse_unknown(tasks: list[str], manager: Any, options: SuiteOptions) -> None:
    """Refuse a task that neither the suite nor the harness has: a slip of the pen, not a task that was renamed."""
    if tasks:
        near = get_close_matches(tasks[0], [*SUITES[options.suite], *manager.all_tasks], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"--tasks: neither {options.suite} nor the harness has a task '{tasks[0]}'.{hint}")


def _run_all(
    opened: OpenModel,
    chosen: list[Chosen],
    manager: Any,
    options: SuiteOptions,
    folder: Path,
    settings: dict[str, Any],
    console: Console,
) -> tuple[Results, dict[str, str]]:
    """Return the results of a model's tasks, kept ones from their files, and why other tasks failed."""
    folder.mkdir(parents=True, exist_ok=True)
    results, failed, model = Results(), dict[str, str](), None
    for one in chosen:
        file = folder / f"{one.task}.json"
        kept = _kept(file, settings)
        if kept is None:
            model = model or harness_model(opened, options.batch_size)
            try:
                kept = run_task(model, one.task, manager, options.limit, options.shots)
            except Exception as error:  # a dataset that is not to be had must not lose the other tasks
                failed[one.task] = first_line(error)[:200]
                continue
            written = {"task": one.task, "settings": settings, **kept}
            write_text(file, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        else:
            console.print(f"{one.task}: kept from {file}")
        results[one.task] = kept
    return results, failed


def _kept(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Read a task's result that was kept from the same settings; None if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: found[key] for key in ("metrics", "documents", "version")}
        return kept if found["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(opened: OpenModel) -> dict[str, Any]:
    """Return what tells one model from another: base weights, adapter files, and how it was loaded."""
    adapter = opened.subject.adapter
    files = sha256_of(*sorted(adapter.glob("adapter_*"))) if adapter else None
    return how_loaded(opened) | {"adapter": files}


def _slug(name: str) -> str:
    """A model's name as a folder's; two that look alike stay apart."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[-60:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
