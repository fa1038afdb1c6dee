"""The demo from end to end at a small size, with the real commands."""

import json
import sys
from pathlib import Path

import pytest

from lola_ft.demo import run_demo as demo
from lola_ft.errors import UserError
from lola_ft.nano import build
from lola_ft.nano.build import NanoSettings, build_nano
from lola_ft.nano.declaration import find_declaration
from lola_ft.nano.pretrain import PretrainSettings

ROOT = Path(__file__).parents[2]
SMALL = NanoSettings(
    n_embd=64, n_inner=128, num_experts=8, vocab_size=1024, english_passes=1, pretrain=PretrainSettings(steps=20)
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout; the demo's recipe is cut to a few steps."""
    for script in ("finetune.py", "merge.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    recipe = (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    lines = ["  max_steps: 30" if line.strip().startswith("max_steps:") else line for line in recipe.splitlines()]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "build_nano", lambda out: build_nano(out, SMALL))
    declarations = {tag: find_declaration(tag) for tag in ("en", "de", "sw", "sr", "sr-Latn", "ja")}
    for module in (build, demo):
        monkeypatch.setattr(module, "load_declarations", lambda: declarations)
    monkeypatch.setattr(demo, "TRAIN_PER_LANGUAGE", 20)
    monkeypatch.setattr(demo, "TEST_PER_LANGUAGE", 2)
    return tmp_path


@pytest.mark.slow
def test_a_second_demo_repeats_the_numbers_of_the_first(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run_demo()
    first = json.loads((checkout / "runs" / "demo" / "demo.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert "held-out sentences" in printed
    assert "5 languages, 6 texts" in " ".join(printed.split())  # a narrow table breaks its title
    assert "Most confused" in printed
    assert "best constant answer" in printed
    assert (checkout / "runs" / "demo" / "languages.png").exists()
    assert (
        first["after"]["asked"]
        == first["before"]["asked"]
        == dict.fromkeys(("en", "de", "sw", "sr", "sr-Latn", "ja"), 2)
    )
    assert first["bytes"]["nf4"] < 0.6 * first["bytes"]["float32"]
    assert (checkout / "runs" / "demo" / "merged" / "merge_report.json").exists()
    demo.run_demo()
    second = json.loads((checkout / "runs" / "demo" / "demo.json").read_text(encoding="utf-8"))
    for name in ("before", "after", "merged"):
        assert second[name] == first[name]  # the same numbers on the same machine
    assert "already" in capsys.readouterr().out  # the base was not built twice


def test_somebody_elses_run_is_not_touched(checkout: Path) -> None:
    run = checkout / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a run of the demo"):
        demo.run_demo()
    assert (run / "thesis.txt").read_text() == "mine"


def test_a_script_that_fails_ends_the_demo_with_its_code(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "build_nano", lambda _: None)
    (checkout / "finetune.py").unlink()
    (checkout / "finetune.py").write_text("import sys\nassert sys.argv[1:] == ['recipes/demo.yaml']\nsys.exit(130)\n")
    before = sys.argv
    with pytest.raises(SystemExit) as end:
        demo.run_demo()
    assert end.value.code == 130
    assert sys.argv is before


def test_outside_a_checkout_the_demo_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="checkout"):
        demo.run_demo()
