"""The suite's tasks: which there are, which are chosen, and what the harness calls them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lola_ft.errors import UserError
from lola_ft.evaluation.suite.benchmarks import LOLA_PAPER, choose, resolve, spoken
from lola_ft.evaluation.suite.suite_tables import mean, metric_of, result_table
from tests.conftest import Outcome

Verb = Callable[..., Outcome]


def test_thirteen_benchmarks_in_four_categories() -> None:
    assert len(LOLA_PAPER) == 13
    assert len({benchmark.category for benchmark in LOLA_PAPER.values()}) == 4
    counts = {name: len(benchmark.languages) for name, benchmark in LOLA_PAPER.items()}
    assert counts == {
        "arc": 31, "m_mmlu": 34, "truthfulqa_mc1": 31, "hellaswag": 30, "mgsm_direct": 11, "mgsm_native_cot": 11,
        "xcopa": 11, "xstorycloze": 11, "xwinograd": 6, "paws": 7, "xnli": 15, "belebele": 122, "lambada": 5,
    }  # fmt: skip
    tasks = [task for benchmark in LOLA_PAPER.values() for task in benchmark.tasks]
    assert len(set(tasks)) == len(tasks)


def test_tasks_and_languages_are_chosen() -> None:
    chosen = choose("lola-paper", ["xcopa", "belebele", "mgsm_direct_ja"], ["sw", "ja"])
    assert [one.task for one in chosen] == ["xcopa_sw", "belebele_jpn_Jpan", "belebele_swh_Latn", "mgsm_direct_ja"]
    assert len(choose("lola-paper", [], [])) == sum(map(len, (b.languages for b in LOLA_PAPER.values())))
    own = choose("lola-paper", ["my_task"], ["sw"])
    assert [(one.task, one.benchmark) for one in own] == [("my_task", None)]


def test_a_language_is_found_under_each_of_its_codes() -> None:
    assert spoken("swh_Latn") == {"swh_Latn", "swh", "sw"}
    assert {"ja", "jp"} <= spoken("jp")
    assert "zh" in spoken("zho_Hans")


@pytest.mark.parametrize(
    ("suite", "tasks", "languages", "message"),
    [
        ("other", [], [], "--suite 'other' is unknown"),
        ("lola-paper", ["xcopa"], ["de"], "none of the chosen tasks of lola-paper is in de. They are in et, ht, id"),
        ("lola-paper", ["xcopa"], ["sw", "de"], "none of the chosen tasks of lola-paper is in de"),
        ("lola-paper", [], ["sw", "swa_Latn"], "is in swa_Latn. They are in acm_Arab"),
    ],
)
def test_a_choice_without_any_task_is_refused(suite: str, tasks: list[str], languages: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(suite, tasks, languages)


def test_renamed_and_missing_tasks_are_told() -> None:
    chosen = choose("lola-paper", ["paws_de", "xwinograd_jp", "xcopa_sw"], [])
    there, missing = resolve(chosen, {"pawsx_de", "xwinograd_ja"})
    assert [(one.task, one.wanted) for one in there] == [("pawsx_de", "paws_de"), ("xwinograd_ja", "xwinograd_jp")]
    assert missing == ["xcopa_sw"]


def test_metrics_are_read_by_their_names() -> None:
    metrics = {"exact_match,remove_whitespace": 0.1, "exact_match,flexible-extract": 0.3}
    assert metric_of(metrics, "exact_match") == (0.3, 0.0)
    assert metric_of({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.9}, "acc") == (0.5, 0.1)
    assert metric_of({"acc_norm,none": 0.9}, "acc") is None
    pair = [{"metrics": {"acc,none": value, "acc_stderr,none": 0.03}} for value in (0.4, 0.6)]
    assert mean(pair, "acc") == "50.0% ± 2.1"
    assert mean([], "acc") == "–"


def test_a_task_of_ones_own_shows_what_it_measures() -> None:
    chosen = choose("lola-paper", ["my_answers", "my_choices"], [])
    results = {
        "my_answers": {"metrics": {"exact_match_stderr,none": 0.1, "exact_match,none": 0.5}},
        "my_choices": {"metrics": {"acc_norm,none": 0.75, "acc,none": 0.25}},
    }
    columns = {str(column.header): list(column.cells) for column in result_table({"base": results}, chosen).columns}
    assert columns["metric"] == ["exact_match", "acc"]
    assert columns["base"] == ["50.0% ± 10.0", "25.0% ± 0.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "lola-paper", "--data", "x.txt"), "--data does nothing with --suite"),
        (("--suite", "lola-paper", "--language", "sw"), "--language does nothing with --suite"),
        (("--suite", "lola-paper", "--task", "loss"), "--task does nothing with --suite"),
        (("--suite", "lola-paper", "--seed", "0"), "--seed does nothing with --suite"),
        (("--data", "x.txt", "--shots", "0"), "--shots does nothing without --suite"),
        (("--data", "x.txt", "--limit", "3"), "--limit does nothing without --suite"),
        (("--suite", "other", "--out", "x"), "--suite 'other' is unknown"),
        (("--suite", "lola-paper", "--languages", "sw,,th"), "--languages 'sw,,th': a language is empty"),
    ],
)
def test_mistakes_are_one_message(verb: Verb, tiny_base: Path, options: tuple[str, ...], message: str) -> None:
    outcome = verb("evaluate", tiny_base, *options)
    assert outcome.code == 2
    assert message in outcome.err


def test_without_the_harness_its_extra_is_named(
    verb: Verb, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lola_ft.evaluation.suite import harness

    monkeypatch.setattr(harness, "version_of", lambda _: None)
    outcome = verb("evaluate", tiny_base, "--suite", "lola-paper", "--out", tmp_path)
    assert outcome.code == 2
    assert "lola-ft[harness]" in outcome.err


@pytest.mark.slow
def test_the_harness_has_every_task() -> None:
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    from lola_ft.evaluation.suite.harness import task_manager

    there, missing = resolve(choose("lola-paper", [], []), set(task_manager().all_tasks))
    assert missing == []
    assert all(one.task == one.wanted for one in there), "0.4.13 has them under the paper's names"


@pytest.mark.slow
def test_a_task_of_ones_own_runs_and_is_kept(
    verb: Verb, tiny_base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    from lola_ft.data import Example, Template
    from lola_ft.data.example import prompt_fields
    from lola_ft.evaluation.choice_task import ChoiceTask, Question
    from lola_ft.evaluation.suite import run_suite
    from lola_ft.open_model import open_model

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = Path(__file__).parents[2] / "data" / "harness"
    options = (
        "--suite",
        "lola-paper",
        "--tasks",
        "lola_ft_colours",
        "--include-path",
        folder,
        "--out",
        tmp_path / "out",
    )
    models = (tiny_base, tiny_adapter, "--base", tiny_base)
    outcome = verb("evaluate", *models, *options)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out/lola-paper.json").read_text())
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    questions = [
        Question(
            Example(prompt_fields(row["question"]), "", "en", ""),
            tuple(f" {text}" for text in row["choices"]),
            row["answer"],
        )
        for row in rows
    ]
    for model, base in ((tiny_base, None), (tiny_adapter, str(tiny_base))):
        own = ChoiceTask(questions, 4).run(open_model(model, base), Template.load("plain"))
        found = report["results"][str(model)]["lola_ft_colours"]
        assert found["documents"] == 4
        assert found["metrics"]["acc,none"] == own.parts["accuracy"][:, 0].mean()

    def never(*_: object) -> None:
        raise AssertionError("a kept task is run again")

    real = run_suite.run_task
    monkeypatch.setattr(run_suite, "run_task", never)
    again = verb("evaluate", *models, *options)
    assert again.code == 0, again.err
    assert again.out.replace("\n", " ").count("already evaluated, so the result is read from") == 2
    changed = verb("evaluate", *models, *options, "--limit", "2")
    assert changed.code == 2
    assert "2 tasks failed" in changed.err, "other settings: run again"
    monkeypatch.setattr(run_suite, "run_task", real)
    assert verb("evaluate", tiny_base, *options, "--limit", "2").code == 0
