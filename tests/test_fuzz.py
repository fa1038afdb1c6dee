"""Two thousand damaged recipes, data files and command lines: each is done or refused, none ends in a traceback.

Seeds are fixed, so a failure is found again by its number.
"""

import gzip
import io
import json
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lola_ft.cli import main
from lola_ft.recipe.bundled import bundled_recipes

pytestmark = pytest.mark.slow

CHUNK = 50
ODD_BYTES = (
    *(
        b"\x00",
        b"\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b'""',
        b",",
        b";",
        b"\t",
        b"{",
        b"}",
    ),
    *(
        b"[",
        b"]",
        b":",
        b"null",
        b"1e999",
        b"NaN",
        b"\\ud800",
        b"\\",
        b"'",
        "ü".encode(),
        "🙂".encode(),
        b"\x1b[2J",
        b"sep=;\n",
    ),
    *(b'"role": "bot"', b"-1", b"true", b"{}", b"[]", b"\xe2\x80\xa8"),
)
ODD_VALUES = (
    *("null", "-1", "0", "1e999", ".nan", "''", "[]", "{}", "~", "~/x", "${X}", "true", "'3'", "3.5", "1_000", "0x10"),
    *(
        "[1, 2]",
        "{a: b}",
        "!!python/name:os.system",
        "*x",
        "&x 1",
        "'\\0'",
        '"\\ud800"',
        "x" * 300,
        "a/b",
        "../..",
    ),
    *("https://example.org/a", "[bold]", "2020-01-01", "|", "yes", "99999999999999999999", "'a: b'", "é", "--", "."),
)
ODD_WORDS = (
    *("", "-", "--", "~", "~/x", "x=y", "=", "train.max_steps", "train.max_steps=", "a.b.c=1"),
    *(
        "data.sources=[]",
        "output=/proc/x",
        "-1",
        "0",
        "1e9",
        "nan",
        "😀",
        "[bold]",
        "x" * 5000,
        "../..",
        "/dev/null",
        "\0",
    ),
    *("--help", "--version", "--base", "--out", "--prompt", "--file", "--data", "--task", "loss", "--format", "text"),
    *(
        "--language",
        "en,sw",
        "--gpu",
        "8GB",
        "--json",
        "--no-data",
        "--dtype",
        "float16",
        "--layout",
        "peft",
        "--check",
    ),
    *(
        "--limit",
        "--suite",
        "lola-paper",
        "--rank",
        "--coverage",
        "2",
        "--template",
        "plain",
        "--seed",
        "--temperature",
    ),
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Content with one to four bytes or pieces changed, taken out, doubled or put in."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        end = min(len(data), place + chance.choice((1, 1, 2, 5, 20, 200)))
        match chance.randrange(6):
            case 0:
                del data[place:end]
            case 1:
                data[place:place] = chance.choice(ODD_BYTES)
            case 2:
                data[place:end] = chance.choice(ODD_BYTES)
            case 3:
                data[place:place] = data[place:end] * chance.randint(1, 3)
            case 4:
                del data[place:]
            case 5:
                data[place:end] = bytes(chance.randrange(256) for _ in range(end - place))
    return bytes(data)


def damaged_recipe(text: str, chance: random.Random) -> str:
    """A recipe with one to four lines changed: another value, no value, another key, another depth, or other bytes."""
    lines = text.splitlines()
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(lines))
        key, colon, _ = lines[place].partition(":")
        match chance.randrange(7):
            case 0:
                lines[place] = f"{key}: {chance.choice(ODD_VALUES)}"
            case 1:
                lines[place] = f"{key}{colon}"
            case 2:
                lines.insert(place, chance.choice(lines))
            case 3:
                lines[place] = " " * chance.randint(0, 8) + lines[place].strip()
            case 4:
                del lines[place : place + chance.randint(1, 3)]
                lines = lines or [""]
            case 5:
                lines[place] = lines[place].replace(
                    chance.choice(lines[place] or " "), chance.choice("x:-{[ '\"#\t"), 1
                )
            case 6:
                lines[place] = damaged(lines[place].encode(), chance).decode("utf-8", "replace")
    return "\n".join(lines) + "\n"


@pytest.fixture
def failures(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[int], list[str]], range], list[str]]:
    """Run commands by number; returns what each one did that no command may do."""

    def run(command: Callable[[int], list[str]], numbers: range) -> list[str]:
        found = []
        for number in numbers:
            arguments, code = command(number), None
            try:
                main(arguments)
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                found.append(f"{number}: {arguments}\n{traceback.format_exc()}")
            printed = capsys.readouterr()
            if code is not None and (
                code not in (0, 2) or "Traceback" in printed.err or (code and not printed.err + printed.out)
            ):
                found.append(f"{number}: {arguments}: exit code {code}\n{printed.err[-2000:]}")
        return found

    return run


@pytest.fixture(autouse=True)
def no_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing comes from the terminal or the network, and relative paths lead nowhere."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n")))
    monkeypatch.chdir(tmp_path)


ALPACA = [{"instruction": f"Say {n}", "input": "", "output": f"number {n}", "language": "en"} for n in range(4)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": ALPACA,
    "text": [{"text": f"text {n}"} for n in range(4)],
    "messages": [{"messages": [{"role": "system", "content": "Be kind."}, *TURNS, *TURNS]}, {"messages": TURNS}],
    "classification": [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
    "translation": [{"source": "eins", "target": "one", "source_language": "de", "target_language": "en"}],
    "preference": [{"prompt": "hi", "chosen": "hello", "rejected": "no"}],
    "unpaired_preference": [{"prompt": "hi", "completion": "hello", "label": True}] * 2,
}


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "".join(delimiter.join(line) + "\n" for line in lines).encode()


def parquet_file(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def arrow_file(rows: list[dict[str, Any]]) -> bytes:
    whole, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return bytes(sink.getvalue())


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "b.json": lambda rows: json.dumps({"version": 1, "data": rows}, indent=1).encode(),
    "a.csv": lambda rows: table(rows, ","),
    "b.csv": lambda rows: b"sep=;\n" + table(rows, ";"),
    "a.tsv": lambda rows: table(rows, "\t"),
    "c.csv": lambda rows: table(rows, ",").decode().encode("utf-16"),
    "a.parquet": parquet_file,
    "a.arrow": arrow_file,
    "a.txt": lambda rows: "\n\n".join(str(row) for row in rows).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.csv.zst": lambda rows: pyarrow.compress(table(rows, ","), codec="zstd", asbytes=True),
}


def recipe_text(base: Path, data: Path, format: str, chance: random.Random) -> str:
    objective = {"preference": "dpo", "unpaired_preference": "kto"}.get(format, "sft")
    source: dict[str, Any] = {"path": str(data), "format": format}
    if format == "classification":
        source["labels"] = {"0": "bad", "1": "good"}
    recipe: dict[str, Any] = {
        "objective": objective,
        "base": {"model": str(base), "quantization": "none", "dtype": "float32"},
        "adapter": {"attention": {"rank": 2}, "dropout": 0.0},
        "data": {"template": "chatml", "sources": [source], "max_length": 64, "packing": False},
        "train": {"max_steps": 1, "micro_batch_size": 2, "optimizer": "adamw"},
        "output": str(data.parent / "run"),
    }
    recipe["data"]["on_bad_row"] = chance.choice(("skip", "error"))
    return json.dumps(recipe)


@pytest.mark.parametrize("start", range(0, 1000, CHUNK))
def test_damaged_data_gives_no_traceback(
    start: int, failures: Callable[..., list[str]], tiny_base: Path, tmp_path: Path
) -> None:
    def command(number: int) -> list[str]:
        chance = random.Random(f"data {number}")
        name, format = chance.choice(list(KINDS)), chance.choice(list(ROWS))
        file = tmp_path / name
        file.write_bytes(damaged(KINDS[name](ROWS[format]), chance))
        (tmp_path / "r.yaml").write_text(recipe_text(tiny_base, file, format, chance))
        return ["preview", str(tmp_path / "r.yaml"), "--examples", "1"]

    assert failures(command, range(start, start + CHUNK)) == []


@pytest.mark.parametrize("start", range(0, 600, CHUNK))
def test_damaged_recipes_give_no_traceback(
    start: int, failures: Callable[..., list[str]], tiny_base: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(ALPACA))

    def command(number: int) -> list[str]:
        chance = random.Random(f"recipe {number}")
        text = chance.choice([recipe.text for recipe in bundled_recipes().values()])
        in_place = text.replace(text.partition("model: ")[2].partition("\n")[0], str(tiny_base), 1)
        by_local = [
            line.replace(line.partition("path: ")[2], str(rows)) if "path: " in line else line
            for line in in_place.split("\n")
        ]
        (tmp_path / "r.yaml").write_text(damaged_recipe("\n".join(by_local), chance), errors="replace")
        return [*chance.choice((["preview"], ["plan", "--no-data"], ["plan"])), str(tmp_path / "r.yaml")]

    assert failures(command, range(start, start + CHUNK)) == []


VERBS = (
    *(
        ["train", "RECIPE", "--dry-run"],
        ["train", "RECIPE", "--dry-run", "--resume"],
        ["preview", "RECIPE"],
        ["plan", "RECIPE"],
    ),
    *(["merge", "BASE", "--out", "OUT"], ["merge", "ADAPTER", "--check", "none", "--out", "OUT"]),
    *(["generate", "BASE", "--prompt", "one", "--max-new-tokens", "1"], ["generate", "BASE", "--file", "ROWS"]),
    *(["evaluate", "BASE", "--data", "ROWS", "--format", "alpaca"], ["evaluate", "BASE", "--data", "ROWS"]),
    *(
        ["convert", "ADAPTER", "--base", "BASE", "--layout", "per_expert", "--out", "OUT"],
        ["publish", "ADAPTER", "--dry-run"],
    ),
    *(
        ["quantize", "nowhere"],
        ["routing", "select", "ROWS", "--languages", "en", "--out", "OUT"],
        ["routing", "report", "ROWS"],
    ),
    *(
        ["recipes", "list"],
        ["recipes", "show", "demo"],
        ["recipes", "copy", "nli", "--out", "OUT"],
        ["families"],
        ["schema"],
    ),
)


@pytest.mark.parametrize("start", range(0, 400, CHUNK))
def test_damaged_command_lines_give_no_traceback(
    start: int, failures: Callable[..., list[str]], tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(ALPACA))
    (tmp_path / "r.yaml").write_text(recipe_text(tiny_base, rows, "alpaca", random.Random(0)))
    places = {
        "RECIPE": str(tmp_path / "r.yaml"),
        "BASE": str(tiny_base),
        "ADAPTER": str(tiny_adapter),
        "ROWS": str(rows),
    }

    def command(number: int) -> list[str]:
        chance = random.Random(f"command {number}")
        words = [places.get(word, word) for word in chance.choice(VERBS)]
        words = [str(tmp_path / f"out-{number}") if word == "OUT" else word for word in words]
        for _ in range(chance.randint(1, 3)):
            place = chance.randint(1, len(words))
            if chance.random() < 0.3:
                del words[place : place + 1]
            else:
                words[place : place + chance.randint(0, 1)] = [chance.choice((*ODD_WORDS, *places.values()))]
        return words

    assert failures(command, range(start, start + CHUNK)) == []
