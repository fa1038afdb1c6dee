"""A run's page and summary: all that manifest and metrics tell, and nothing of the machine or from elsewhere."""

import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lola_ft.console import Console
from lola_ft.training.reports.run_page import render_run_page, without_places
from lola_ft.training.reports.summary_box import print_summary, summary_rows
from lola_ft.training.reports.svg_chart import line_chart, thinned, ticks

LANGUAGES = {
    f"l{number:02}": {"kept": 10 + number, "trained_tokens": 100 * number, "rows": 12} for number in range(1, 30)
}
MANIFEST: dict[str, Any] = {
    "recipe": {
        "objective": "sft",
        "base": {"model": "/home/someone/models/nano", "revision": "main"},
        "adapter": {"attention": {"rank": 16}, "experts": {"rank": 8}, "alpha": 32.0},
        "data": {"sources": [{"path": "/data/private/rows.jsonl", "format": "alpaca"}]},
        "output": "~/runs/sw",
    },
    "code": {"commit": "0123456789abcdef0123", "dirty": True},
    "versions": {"torch": "2.13.0", "lola-ft": "0.1.0"},
    "hardware": {"cpu": "A <CPU> & more", "gpu": None, "processes": 1},
    "base": {"id": "", "fingerprint": "0123456789abcdef"},
    "trained": {"attention": {"tensors": 4, "parameters": 1000}, "experts": {"tensors": 4, "parameters": 234}},
    "data": {"train": {"total": {"kept": 700, "rows": 720}, "languages": LANGUAGES}},
    "stages": [{"run": "first", "steps": 10}, {"run": "sw", "steps": 20}],
    "results": {
        "steps": 20,
        "tokens": 12345,
        "skipped_steps": 2,
        "best_step": 15,
        "routing": {"lowest load entropy of a layer": 0.71},
        "eval_loss_by_language": {"l01": 1.25},
    },
    "timings": {"prepare_s": 2.0, "train_s": 130.0, "tokens_per_s": 95.0},
    "memory": {"peak_mb": 812},
}
METRICS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 4.0, "eval_loss_by_language": {"l01": 4.0, "l02": None}},
    *({"step": step, "loss": 4 - step / 10, "learning_rate": 1e-4, "tokens_per_s": 90.0} for step in range(1, 21)),
    {
        "step": 12,
        "warning": "loss_spike",
        "message": "loss 9.1 at /home/someone/rows.jsonl:17 is far above <the others>",
    },
    {"step": 20, "eval_loss": 2.5, "router_load_entropy": {"1": 0.9, "3": 0.71}},
]


@pytest.fixture(scope="module")
def page() -> str:
    return render_run_page("sw", MANIFEST, METRICS)


def text_of(html: str) -> str:
    """Return the words of a page, as a reader has them."""
    found = list[str]()

    class Words(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    Words().feed(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return " ".join(" ".join(found).split())


def test_it_tells_what_manifest_and_metrics_know(page: str) -> None:
    text = text_of(page)
    for says in (
        "attention rank 16, experts rank 8, alpha 32",
        "1,234",
        "700 rows in 29 languages",
        "3.9 at first, 2 at the end",
        "4 at first, 2.5 at the end",
        "2 min",
        "lowest load entropy of a layer 0.71",
        "the adapter is that of step 15, the best evaluation",
        "Step 12, loss spike.",
        "is far above <the others>",
        "A <CPU> & more",
        "9 more languages",
        "0123456789ab, with changes",
        "objective: sft",
    ):
        assert says in text, says
    for heading in ("Stages", "Data", "Curves", "Routing", "Guards", "Environment", "Recipe", "Load entropy by layer"):
        assert f">{heading}</h" in page


def test_it_needs_nothing_else(page: str) -> None:
    assert not re.search(r"<(script|link|img|iframe)|url\(|https?://|@import", page)
    assert page.count("<svg viewBox") == 5  # loss, rate, by language, entropy, speed


def test_it_names_no_folder_of_the_machine(page: str) -> None:
    assert "someone" not in page
    assert "private" not in page
    assert "…/rows.jsonl" in page
    assert "…/rows.jsonl:17" in page


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/a b.jsonl", "…/a b.jsonl"),
        ("see ~/data/x.jsonl, line 3", "see …/x.jsonl, line 3"),
        ("C:\\Users\\me\\rows.csv", "…/rows.csv"),
        ("recipes/data/rows.jsonl", "recipes/data/rows.jsonl"),
        ("dice-research/lola_v1", "dice-research/lola_v1"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("tokens/s and 3/4", "tokens/s and 3/4"),
        ("'/srv/x/y.yaml'", "'…/y.yaml'"),
    ],
)
def test_places_are_cut_to_their_last_name(text: str, kept: str) -> None:
    assert without_places({"a": [text]}) == {"a": [kept]}


def test_a_manifest_that_knows_little_makes_a_page() -> None:
    page = render_run_page("run", {"recipe": {"objective": "dpo"}}, [])
    assert "No guard has warned." in page
    assert ">Curves<" not in page


def test_the_box_says_what_was_trained_and_what_came_of_it() -> None:
    rows = dict(summary_rows(MANIFEST, METRICS))
    assert rows["trained"].startswith("1,234 parameters on ")
    assert rows["loss"] == "3.900 at first, 2.000 at the end"
    assert rows["validation loss"] == "4.000 at first, 2.500 at the end"
    assert rows["time"] == "2 min, 95 tokens per second"
    assert "2 steps" in rows["skipped"]


def test_a_folder_with_brackets_is_named_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "exp[/v2] and [bold] more"
    folder.mkdir(parents=True)
    manifest = MANIFEST | {"recipe": MANIFEST["recipe"] | {"base": {"model": "a[/b]"}}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    stream = io.StringIO()
    print_summary(folder, Console(file=stream, width=60))
    said = stream.getvalue()
    assert "on a[/b]:" in " ".join(said.replace("│", " ").split())
    assert f"Adapter:   {folder / 'adapter'}\n" in said, "a path is not broken"
    assert f"lola-ft merge '{folder}'\n" in said
    assert max(len(line) for line in said.splitlines() if line[:1] in "│╭╰") <= 60


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.2, 3.2], [-5.0, 7.0], [1e-5, 9e-5], [0.0, 0.0], [17, 12_345]])
def test_ticks_are_round_and_hold_all_values(values: list[float]) -> None:
    found = ticks(values)
    assert found[0] <= min(values)
    assert found[-1] >= max(values) * (1 - 1e-9)
    assert 2 <= len(found) <= 7
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}


def test_a_chart_puts_points_where_they_belong() -> None:
    chart = line_chart({"a": [(0, 0.0), (10, 4.0)], "none": []}, "loss")
    (path,) = re.findall(r'points="([^"]+)"', chart)
    (x0, y0), (x1, y1) = ((float(number) for number in pair.split(",")) for pair in path.split())
    assert x0 < x1
    assert y0 > y1, "more is higher up"
    assert "none" not in chart
    assert line_chart({}, "loss") == ""


def test_a_long_curve_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(5000)]
    points[2345] = (2345.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= 420
    assert (2345.0, 99.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
