"""The demo's tables and picture: every text is in them once, and the weakest are named."""

import io
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from lola_ft.demo.accuracy_picture import draw_accuracy, groups_of
from lola_ft.demo.accuracy_tables import accuracy_table, confusion_table
from lola_ft.evaluation import ExactMatch
from lola_ft.nano.declaration import Declaration, load_declarations


@pytest.fixture
def declarations() -> dict[str, Declaration]:
    return load_declarations()


@pytest.fixture
def result(declarations: dict[str, Declaration]) -> ExactMatch:
    """All eight right but in Serbian (Latin), which is taken for Bosnian six times."""
    right = Counter(dict.fromkeys(declarations, 8)) - Counter({"sr-Latn": 6})
    asked = Counter(dict.fromkeys(declarations, 8))
    return ExactMatch(right, asked, stopped=asked.total(), confused=Counter({("Serbian", "Bosnian"): 6}))


def shown(table: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_the_table_has_families_and_the_weakest(result: ExactMatch, declarations: dict[str, Declaration]) -> None:
    before = ExactMatch(asked=result.asked)
    text = shown(accuracy_table({"before": before, "after": result}, declarations))
    texts = len(declarations)
    assert f"189 languages, {texts} texts" in " ".join(text.split())
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert cells["all"] == [str(texts), f"{8 * texts:,}", "0.0%", f"{1 - 6 / (8 * texts):.1%}"]
    assert cells["Serbian (sr-Latn)"] == ["1", "8", "0.0%", "25.0%"]
    assert cells["Turkic"][-1] == "100.0%"
    assert list(cells)[1:3] == ["Indo-European", "Atlantic-Congo"], "the largest first"


def test_confusions_are_ranked(result: ExactMatch) -> None:
    result.confused["Malay", "Indonesian"] = 7
    lines = [line for line in shown(confusion_table(result)).splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["Malay", "Serbian"]


@pytest.mark.usefixtures("pictures")
def test_the_picture_has_every_text_once(
    result: ExactMatch, declarations: dict[str, Declaration], tmp_path: Path
) -> None:
    groups = groups_of(result)
    assert sorted(tag for tags in groups.values() for tag in tags) == sorted(result.asked)
    assert "Slavic" in groups, "Indo-European is split into its branches"
    assert "Turkic" in groups
    assert groups["Slavic"][-1] == "sr-Latn", "the weakest stands last"
    path = draw_accuracy(result, declarations, tmp_path / "languages.png")
    height, width = imread(path).shape[:2]
    assert 1000 < width < 1300
    assert 800 < height < 1500
