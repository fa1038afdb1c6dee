"""Measure the effect of training on one language on other languages: `python benchmarks/transfer_matrix.py --help`.

On the nano base, or another one: an adapter for each of some widespread languages, trained on the declaration's
articles 1 to 25 in it. Then bits per byte of articles 26 to 30 in these languages, in small relatives of theirs and in
strangers, against the base. Prints the matrix and the mean change by kinship, then one JSON line; writes the matrix as
a picture. Languages are named with their branch, so that relatives stand side by side.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from train_on_text import train_on_text

from lola_ft.console import Console
from lola_ft.evaluation.evaluate import TaskOptions, evaluate_rows
from lola_ft.evaluation.held_out_rows import RowOptions
from lola_ft.nano import build_nano
from lola_ft.nano.declaration import find_declaration
from lola_ft.routing.language_families import Language, find_language

SOURCES = "es ru de id hi"
RELATIVES = "ast gl oc be mk nds fy jv su ne bho"
STRANGERS = "eu ka yo sah mi"
KINSHIP = ("itself", "same branch", "same family", "stranger")


def main() -> None:
    args = parse()
    sources, others = args.sources.split(), [*args.relatives.split(), *args.strangers.split()]
    base = Path(args.base) if args.base else build_nano()
    out = Path(args.out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "held_out.jsonl", [*sources, *others], held_out=True)
        runs = [run(base, folder, code, args) for code in sources]
        models = [str(base), *map(str, runs)]
        rows = RowOptions(files=[str(folder / "held_out.jsonl")], format="text", language_column="language")
        options, silent = TaskOptions(batch_size=32, transfer=True), Console(quiet=True)
        evaluate_rows(models, rows, options, quantization="none", out=str(out), console=silent)
    cells = matrix(json.loads((out / "transfer.json").read_text(encoding="utf-8")))
    result = by_kinship(cells)
    print(*matrix_lines(cells), sep="\n")
    Console().print(table(result))
    print(f"The picture is {out / 'transfer.png'}.")
    print(json.dumps({"kinship": result, "cells": cells, "shape": vars(args)}, ensure_ascii=False))


def known(code: str) -> Language:
    found = find_language(code)
    assert found, f"{code} is not in the table of languages"
    return found


def label(code: str) -> str:
    """Return a label such as `Romance es`, by which tables and pictures are sorted."""
    return f"{known(code).branch} {code}"


def write_rows(file: Path, codes: list[str], held_out: bool) -> None:
    """Write each paragraph as a text with its language's label: the held-out ones, or those to train on."""
    rows = []
    for code in codes:
        declaration = find_declaration(code)
        paragraphs = declaration.held_out_paragraphs if held_out else declaration.training_paragraphs
        rows += [{"text": text, "language": label(code)} for text in paragraphs]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(base: Path, folder: Path, code: str, args: argparse.Namespace) -> Path:
    """Train on one language and return the run's folder."""
    data, out = folder / f"{code}.jsonl", folder / code
    write_rows(data, [code], held_out=False)
    groups = {group: {"rank": args.rank} for group in ("attention", "mlp", "experts")}
    return train_on_text(base, data, out, groups, args, quantization="none", overlong="split")


def matrix(transfer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a cell for each pair of languages, with its kinship and the change with its interval."""
    cells = []
    for row in transfer:
        [trained] = row["trained"]
        for tested, change in row["change"].items():
            if tested != "all":
                one, other = (known(name.rpartition(" ")[2]) for name in (trained, tested))
                cells.append({"trained": one.code, "tested": other.code, "kinship": kinship(one, other), **change})
    return cells


def matrix_lines(cells: list[dict[str, Any]]) -> list[str]:
    """Return a line per trained language with a column per tested one; * means that the interval excludes zero."""
    first = cells[0]["trained"]
    lines = ["trained  " + "".join(f"{cell['tested']:>7} " for cell in cells if cell["trained"] == first)]
    for trained in dict.fromkeys(cell["trained"] for cell in cells):
        own = [cell for cell in cells if cell["trained"] == trained]
        stars = ("*" if cell["low"] > 0 or cell["high"] < 0 else " " for cell in own)
        values = (f"{cell['value']:+7.3f}{star}" for cell, star in zip(own, stars, strict=True))
        lines.append(f"{trained:9}" + "".join(values))
    return lines


def kinship(one: Language, other: Language) -> str:
    if one.code == other.code:
        return "itself"
    if (one.family, one.branch) == (other.family, other.branch):
        return "same branch"
    return "same family" if one.family == other.family else "stranger"


def by_kinship(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the mean change of each kinship, and the number of pairs whose interval is all better or all worse."""
    groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["kinship"]].append(cell)
    return {
        name: {
            "pairs": len(groups[name]),
            "mean": fmean(cell["value"] for cell in groups[name]),
            "least": min(cell["value"] for cell in groups[name]),
            "most": max(cell["value"] for cell in groups[name]),
            "better": sum(cell["high"] < 0 for cell in groups[name]),
            "worse": sum(cell["low"] > 0 for cell in groups[name]),
        }
        for name in KINSHIP
        if groups[name]
    }


def table(result: dict[str, dict[str, Any]]) -> Table:
    made = Table(title="Change in bits per byte by kinship (below zero is better)", title_justify="left")
    for heading in ("tested language", "pairs", "mean", "range", "better", "worse"):
        made.add_column(heading, justify="left" if heading == "tested language" else "right")
    for name, found in result.items():
        span = f"{found['least']:+.3f} to {found['most']:+.3f}"
        counts = (str(found["better"]), str(found["worse"]))
        made.add_row(name, str(found["pairs"]), f"{found['mean']:+.3f}", span, *counts)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="any base's folder; the nano base if left out, built if it is not there")
    parser.add_argument("--sources", default=SOURCES, help="to train on, one adapter each")
    parser.add_argument("--relatives", default=RELATIVES, help="to test, beside the sources")
    parser.add_argument("--strangers", default=STRANGERS, help="to test, too")
    parser.add_argument("--out", default="reports/transfer", help="folder of the picture and all numbers")
    for name, value in {"rank": 8, "steps": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (0.002)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
