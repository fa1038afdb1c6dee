"""A command ends with one message and the right code, for any terminal, path and moment of an interruption."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lola_ft
from lola_ft.console import Console
from lola_ft.errors import UserError
from lola_ft.start import checked_arguments
from tests.conftest import alpaca_rows, assert_says, write_rows

ROOT = Path(__file__).parents[1]


def lola(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `lola-ft …` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    command = [sys.executable, "-m", "lola_ft", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


RECIPE = """\
base: {{model: {base}, quantization: none, dtype: float32}}
adapter: {{attention: {{rank: 2}}}}
data:
  sources: [{{path: {rows}, format: alpaca, language: en}}]
  max_length: 128
train: {{max_steps: 1, micro_batch_size: 2, grad_accum_steps: 1, optimizer: adamw}}
output: {output}
"""


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of one step; keywords change its paths."""
    rows = write_rows(tmp_path / "rows.jsonl", alpaca_rows(6))

    def write(**paths: Any) -> Path:
        text = RECIPE.format(**{"base": tiny_base, "rows": rows, "output": tmp_path / "run"} | paths)
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


def test_without_a_verb_the_three_commands_that_one_wants_first_are_named() -> None:
    from tests.test_startup import HEAVY, packages_imported, python

    done = python(["-X", "importtime", "-m", "lola_ft"])
    assert done.returncode == 0
    for verb in ("lola-ft doctor", "lola-ft recipes list", "lola-ft train RECIPE", "lola-ft --help"):
        assert verb in done.stdout
    assert len(done.stdout.splitlines()) < 10
    assert not packages_imported(done.stderr) & HEAVY


def test_the_version_is_that_of_the_package() -> None:
    assert lola("--version").stdout == f"lola-ft {lola_ft.__version__}\n"


def test_a_taken_output_is_told_before_anything_heavy_is_imported(recipe: Callable[..., Path], tmp_path: Path) -> None:
    from tests.test_startup import HEAVY, packages_imported, python

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("mine")
    done = python(["-X", "importtime", "-m", "lola_ft", "train", str(recipe())])
    assert done.returncode == 2
    assert_says(
        done.stderr.splitlines()[-1], f"error: {tmp_path / 'run'}: already holds a run. Go on with it with --resume"
    )
    assert not packages_imported(done.stderr) & HEAVY


@pytest.mark.parametrize("name", ["a file", "inside a file"])
def test_an_impossible_output_is_refused_before_anything_heavy_is_imported(
    name: str, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / ("deep" if name == "inside a file" else "")
    from tests.test_startup import HEAVY, packages_imported, python

    done = python(["-X", "importtime", "-m", "lola_ft", "train", str(recipe(output=output))])
    assert done.returncode == 2, done.stderr
    assert_says(done.stderr.splitlines()[-1], f"{tmp_path / 'file'}")
    assert not packages_imported(done.stderr) & HEAVY


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "run", "--out", "FILE/merged"],
        ["generate", "base", "--prompt", "x", "--out", "FILE/a.jsonl"],
        ["evaluate", "base", "--data", "a.jsonl", "--out", "FILE/report"],
        ["routing", "profile", "base", "--data", "a.txt", "--out", "FILE/p.safetensors"],
    ],
)
def test_every_verb_looks_where_it_will_write_first(command: list[str], tmp_path: Path) -> None:
    from tests.test_startup import HEAVY, packages_imported, python

    (tmp_path / "file").write_text("")
    words = [word.replace("FILE", str(tmp_path / "file")) for word in command]
    done = python(["-X", "importtime", "-m", "lola_ft", *words])
    assert done.returncode == 2
    assert_says(done.stderr.splitlines()[-1], f"{tmp_path / 'file'} is not a folder")
    assert not packages_imported(done.stderr) & HEAVY


@pytest.mark.slow
def test_the_commonest_mistakes_show_in_half_the_time_of_importing_torch(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """`benchmarks/startup.py` has the numbers."""
    from tests.test_startup import python

    def fastest_of_three(arguments: list[str]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            python(arguments)
            times.append(time.perf_counter() - began)
        return min(times)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("mine")
    torch = fastest_of_three(["-c", "import torch"])
    train = ["-m", "lola_ft", "train", str(recipe())]
    assert fastest_of_three(train) < torch / 2
    assert fastest_of_three([*train, "train.learnin_rate=1"]) < torch / 2


@pytest.mark.parametrize(
    "path", ["runs/run [bold] y", "runs/exp[/v2]", "runs/" + "a-long-name/" * 30 + "end", "[red]x[/red]"]
)
def test_a_path_is_printed_as_it_is(path: str) -> None:
    console = Console(file=io.StringIO(), width=40)
    console.print(f"The adapter is in {path}.")
    assert console.file.getvalue() == f"The adapter is in {path}.\n"  # type: ignore[attr-defined]


def test_every_message_is_printed_by_that_console() -> None:
    imports = [
        path
        for path in (ROOT / "lola_ft").rglob("*.py")
        if re.search(r"from rich.console import .*Console\b", path.read_text())
    ]
    assert imports == []


def test_a_run_in_a_folder_with_brackets_names_it(
    recipe: Callable[..., Path], verb: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = verb("train", recipe(), f"output={tmp_path}/exp[/v2] and [bold] more")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "exp[" / "v2] and [bold] more"
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert f"lola-ft merge '{folder}'\n" in outcome.out
    assert "merge.py" not in outcome.out


def test_home_is_put_in_once(
    recipe: Callable[..., Path],
    verb: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    shutil.copytree(tiny_base, home / "base")
    shutil.copy(tmp_path / "rows.jsonl", home / "rows.jsonl") if (tmp_path / "rows.jsonl").exists() else None
    write_rows(home / "rows.jsonl", alpaca_rows(6))
    (home / "my.jinja").write_text("{{ prompt }}\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    file = recipe(base="~/base", rows="~/rows.jsonl", output="~/runs/a")
    outcome = verb("train", file, "data.template=~/my.jinja")
    assert outcome.code == 0, outcome.err
    assert list(work.iterdir()) == []
    assert (home / "runs" / "a" / "adapter").is_dir()
    assert verb("merge", "~/runs/a", "--out=~/merged", "--check", "none").code == 0
    assert (home / "merged" / "config.json").is_file()
    assert_says(verb("preview", recipe(output="~nobody-here/x")).err, "output: no home folder is known for the `~`")


def test_a_variable_of_the_shell_is_refused(recipe: Callable[..., Path], verb: Callable[..., Any]) -> None:
    for value in ("${OUT}runs/a", "$HOME/runs"):
        outcome = verb("train", recipe(output=value))
        assert outcome.code == 2
        assert_says(outcome.err, "output: $ … is not replaced in a recipe … `output=…`")
    assert_says(verb("train", recipe(rows="'${DATA}/a.jsonl'")).err, "data.sources.0.path: ${DATA} is not replaced")
    assert_says(verb("train", recipe(rows="${DATA}/a.jsonl")).err, "not valid YAML … ${X} are not replaced")


@pytest.mark.slow
def test_a_base_that_has_moved_is_named_with_the_option_that_helps(
    recipe: Callable[..., Path],
    verb: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
) -> None:
    shutil.copytree(tiny_base, tmp_path / "there" / "base")
    monkeypatch.chdir(tmp_path / "there")
    assert verb("train", recipe(base="./base")).code == 0
    monkeypatch.chdir(tmp_path)
    for command in (("generate", tmp_path / "run", "--prompt", "x"), ("merge", tmp_path / "run")):
        outcome = verb(*command)
        assert outcome.code == 2
        assert_says(
            outcome.err, f"./base: no such folder in {tmp_path} … It is the base of {tmp_path / 'run'} … --base"
        )
    given = ("generate", tmp_path / "run", "--prompt", "x", "--base", "there/base", "--max-new-tokens", "2")
    assert verb(*given).code == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_stdout_of_another_encoding_gets_replaced_characters(
    encoding: str, recipe: Callable[..., Path], verb: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    assert verb("preview", recipe()).code == 0
    sys.stdout.flush()
    assert "Training data" in written.getvalue().decode(encoding)
    assert "?" in written.getvalue().decode(encoding)


def test_arguments_that_are_not_text_are_refused(verb: Callable[..., Any], tiny_base: Path) -> None:
    outcome = verb("generate", tiny_base, "--prompt", os.fsdecode(b"caf\xe9"))
    assert outcome.code == 2
    assert_says(outcome.err, "error: the argument 'caf\ufffd' is not text in UTF-8")


def test_a_tilde_in_a_prompt_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["generate", "~/run", "--out=~/a.jsonl", "--prompt", "~/x", "--prompt=~/y", "a~/b", "~nobody-here/z"]
    assert checked_arguments(given) == [
        *("generate", "/home/me/run", "--out=/home/me/a.jsonl", "--prompt", "~/x", "--prompt=~/y", "a~/b"),
        "~nobody-here/z",
    ]
    with pytest.raises(UserError):
        checked_arguments(["\udce9"])


@pytest.mark.parametrize(
    ("option", "given", "answers"),
    [
        ("--prompt", b"one two\n", 1),
        ("--file", b"one\n\ntwo\r\n", 2),
        ("--file", b'{"prompt": "one", "id": 1}\n{"prompt": "two"}\n', 2),
        ("--prompt", b"caf\xe9", 0),
        ("--file", b"one\ncaf\xe9\n", 0),
        ("--file", b'{"prompt": "one"}\n{"prompt"\n', 0),
        ("--prompt", b"", 0),
    ],
)
def test_prompts_come_from_standard_input(
    option: str, given: bytes, answers: int, verb: Callable[..., Any], tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    out = tmp_path / "answers.jsonl"
    outcome = verb("generate", tiny_base, option, "-", "--max-new-tokens", "2", "--out", out)
    assert outcome.code == (0 if answers else 2), outcome.err
    assert len(out.read_text().splitlines() if out.exists() else []) == answers
    if not answers:
        assert_says(outcome.err, "error: ")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.6, 0.9, 1.2, 1.6, 2.0, 2.5, 3.0])
def test_ctrl_c_while_libraries_load_is_one_line(seconds: float, recipe: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "lola_ft", "preview", str(recipe())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    time.sleep(seconds)
    assert process.poll() is None, "it was over before it could be stopped"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1:] == ["Stopped."]
