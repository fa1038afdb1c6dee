"""Commands and Python in README and docs run as written, page by page, on what `make demo` leaves behind.

In place of the full-size base stands a nano base that was trained for a few steps, and a run trains for one step: what
a command does is tested elsewhere, here it must only work as it is written.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lola_ft.recipe import load_recipe
from tests.code_blocks import BLOCKS, ROOT, Block
from tests.conftest import Outcome
from tests.test_docs_examples import SYNOPSIS

pytestmark = pytest.mark.slow

NOT_HERE = {
    "dice-research/lola_v1": "needs the Hub",
    "user/": "sends to the Hub, or needs a run that was published",
    "recipes/translation.yaml": "reads data from the Hub",
    "recipes/instruct": "reads data from the Hub; the demo's recipe takes its place",
    "recipes/baseline_dense.yaml": "reads data from the Hub",
    "runs/instruct": "the run of a recipe that needs the Hub",
    "--suite": "needs the extra `harness`; tests/evaluation/suite runs it",
    "--permutations 9999": "takes minutes; tests/routing runs it with fewer",
    "lola-ft nano": "takes minutes; tests/nano runs it with fewer steps",
    "FINGERPRINT": "a placeholder",
    "~/": "the reader's own folder",
}
"""Parts of commands that are parsed (tests/test_docs_examples.py) and not run, and why."""
VERBS = ("lola-ft", "finetune.py", "merge.py")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout after `make demo`: a base in .cache/nano, a run and its merge in runs/demo."""
    from lola_ft.nano.build import NanoSettings, build_nano
    from lola_ft.nano.pretrain import PretrainSettings
    from tests.nano.conftest import use_two_languages

    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "tests", "finetune.py", "merge.py", "lola_ft"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_two_languages(patch)
        build_nano(settings=NanoSettings(vocab_size=512, pretrain=PretrainSettings(steps=2)))
    rows = [{"prompt": f"Sentence {i}. —", "completion": "Swahili", "language": "sw"} for i in range(64)]
    (folder / ".cache" / "demo").mkdir(parents=True)
    for name in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / ".cache" / "demo" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for command in ("finetune.py recipes/demo.yaml train.max_steps=1 data.validation=0.1", "merge.py runs/demo"):
        subprocess.run([sys.executable, *command.split()], cwd=folder, check=True, env=environment())
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def runnable(block: Block) -> list[list[str]]:
    """Return the commands of ours that need neither the Hub nor minutes."""
    lines = [(shlex.join(words), words) for words in block.commands]
    return [
        words
        for line, words in lines
        if any(verb in words[:2] for verb in VERBS)
        and not SYNOPSIS.search(line)
        and not any(part in line for part in NOT_HERE)
    ]


PAGES = sorted({block.document for block in BLOCKS if runnable(block)})


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run_one_after_another(
    page: str, workplace: Path, verb: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "checkout"
    shutil.copytree(workplace, here, symlinks=True)
    monkeypatch.chdir(here)
    for words in [words for block in BLOCKS if block.document == page for words in runnable(block)]:
        outcome = verb(*on_the_nano_base(words))
        assert outcome.code == 0, f"{shlex.join(words)}\n{outcome.err}"


def on_the_nano_base(words: list[str]) -> list[str]:
    """Return the arguments of `lola-ft`, with the nano base and a single step where a recipe is named."""
    program = words[1] if words[0] == "python" else words[0]
    start = {"finetune.py": ["train"], "merge.py": ["merge"], "lola-ft": []}[program]
    arguments = [*start, *words[words.index(program) + 1 :]]
    if arguments[:2] == ["routing", "texts"]:
        arguments += ["--languages", "sw,zu,en,fr"]
    if arguments[:2] == ["routing", "profile"]:
        arguments += ["--max-tokens-per-language", "500"]
    if arguments[0] == "merge" and arguments[1] == "runs/demo":
        shutil.rmtree("runs/demo/merged", ignore_errors=True)
    recipes = [place for place, word in enumerate(arguments) if word.startswith("recipes/") and word.endswith(".yaml")]
    if not recipes or arguments[0] not in ("train", "preview", "plan"):
        return arguments
    if arguments[0] == "train" and "demo" in arguments[recipes[0]]:
        shutil.rmtree("runs/demo")
    changes = ["base.model=.cache/nano"]
    if load_recipe(arguments[recipes[0]]).data.max_length > 512:
        changes.append("data.max_length=512")  # all of the nano base's positions
    if arguments[0] == "train":
        changes += ["train.max_steps=1", "train.micro_batch_size=2", "train.grad_accum_steps=1"]
    place = recipes[0] + 1
    return [*arguments[:place], *changes, *arguments[place:]]


def test_most_commands_are_run() -> None:
    """The list of what is left out does not swallow the others."""
    run = sum(len(runnable(block)) for block in BLOCKS)
    ours = sum(1 for block in BLOCKS for words in block.commands if any(verb in words[:2] for verb in VERBS))
    assert run > 30
    assert run > ours / 3
    texts = [shlex.join(words) for block in BLOCKS for words in block.commands]
    assert [part for part in NOT_HERE if not any(part in text for text in texts)] == []


def test_the_readmes_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block.text for block in BLOCKS if block.document == "README.md" and block.language == "python"]
    monkeypatch.chdir(workplace)
    for name, here in (("dice-research/lola_v1", ".cache/nano"), ("runs/instruct", "runs/demo"), ("merged", "m")):
        assert f'"{name}' in code
        code = code.replace(f'"{name}', f'"{here}')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "Mji mkuu wa Kenya ni upi?" in done.stdout
    assert (workplace / "m" / "merge_report.json").is_file()
