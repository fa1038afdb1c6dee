"""The value of training only the experts that a language uses: `python benchmarks/expert_choice.py --help`

Continued training of the nano base on text in some languages, with LoRA of one rank on all experts, on the experts that
get most of the languages' tokens, on as many random ones, or only on attention. Measures bits per byte of held-out
names, in the trained languages and in others, compared with the base, with bootstrap intervals over texts. Prints a
table, then one JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from train_on_text import train_on_text

from lola_ft.data import Example
from lola_ft.data.prompt_template import Template
from lola_ft.evaluation.comparison import compare
from lola_ft.evaluation.loss_task import LossTask
from lola_ft.nano import build_nano
from lola_ft.nano.corpus import build_documents, load_split
from lola_ft.open_model import open_model
from lola_ft.routing import profile_routing, save_choice, select_experts

TARGET, ELSEWHERE = "trained", "elsewhere"


def main() -> None:
    args = parse()
    languages = args.languages.split(",")
    base = build_nano(args.base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_training_text(folder / "text.jsonl", languages, args.passes)
        variants = make_variants(base, folder, languages, args)
        runs = {name: run(base, folder, name, adapter, args) for name, adapter in variants.items()}
        result = measure(base, {name: path for name, (path, _) in runs.items()}, languages)
    for name, (_, parameters) in runs.items():
        result[name]["parameters"] = parameters
    Console().print(table(result, args))
    print(json.dumps({"result": result, "shape": vars(args)}))


def write_training_text(path: Path, languages: list[str], passes: int) -> None:
    """Write lists of names that pre-training also contained, in other combinations."""
    rows = []
    for language in languages:
        terms = [term for term in load_split().train if term.language == language]
        rows += [{"text": text, "language": language} for text in build_documents(terms, passes, passes, seed=1)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_variants(base: Path, folder: Path, languages: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe's `adapter` section of each variant, by name."""
    profile = profile_routing(base, [folder / "text.jsonl"], language_column="language")
    chosen = save_choice(select_experts(profile, languages, args.coverage), folder / "selected.json")
    rank = args.rank
    variants: dict[str, Any] = {
        "all experts": {"experts": {"rank": rank}},
        "selected": {"experts": {"rank": rank, "select": str(chosen)}},
    }
    for seed in range(args.controls):
        control = save_choice(
            select_experts(profile, languages, args.coverage, seed=seed), folder / f"random{seed}.json"
        )
        variants[f"random {seed}"] = {"experts": {"rank": rank, "select": str(control)}}
    return variants | {"attention alone": {"attention": {"rank": rank}}}


def run(base: Path, folder: Path, name: str, adapter: dict[str, Any], args: argparse.Namespace) -> tuple[Path, int]:
    """Train one variant; return its run folder and the number of trained parameters."""
    out = folder / name.replace(" ", "-")
    train_on_text(base, folder / "text.jsonl", out, adapter, args)
    trained = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["trained"]
    return out, sum(group["parameters"] for group in trained.values())


def measure(base: Path, runs: dict[str, Path], languages: list[str]) -> dict[str, dict[str, Any]]:
    """Return bits per byte on held-out names, and its change from the base, in the trained languages and in others."""
    examples = []
    for language in sorted({term.language for term in load_split().held_out}):
        terms = [term for term in load_split().held_out if term.language == language]
        group = TARGET if language in languages else ELSEWHERE
        documents = build_documents(terms, 1, 1, seed=2)
        examples += [Example(None, text, group, f"{language}:{i}") for i, text in enumerate(documents)]
    task = LossTask(examples, batch_size=32)
    names = ["base", *runs]
    measured = []
    for path in (base, *runs.values()):
        measured.append(task.run(open_model(path, quantization="nf4", dtype="float32"), Template.load("plain")))
    lines = compare(names, measured, task.measures, task.languages).lines["bits_per_byte"]
    return {
        name: {
            group: {
                "bits_per_byte": round(lines[group].values[i].value, 4),
                "change": None if not i else lines[group].differences[i].as_dict(),
            }
            for group in (TARGET, ELSEWHERE)
        }
        for i, name in enumerate(names)
    }


def table(result: dict[str, dict[str, Any]], args: argparse.Namespace) -> Table:
    made = Table(title=f"Bits per byte of held-out names; trained on {args.languages}", title_justify="left")
    for heading in ("LoRA on", "parameters", f"{TARGET}: change", "95 %", f"{ELSEWHERE}: change", "95 %"):
        made.add_column(heading, justify="left" if heading == "LoRA on" else "right")
    for name, groups in result.items():
        if name == "base":
            continue
        cells = [name, f"{groups['parameters']:,}"]
        for group in (TARGET, ELSEWHERE):
            change = groups[group]["change"]
            cells += [f"{change['value']:+.4f}", f"{change['low']:+.4f} to {change['high']:+.4f}"]
        made.add_row(*cells)
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=".cache/nano", help="built there if it is not")
    parser.add_argument("--languages", default="sw,zu", help="to train on, codes with commas between (sw,zu)")
    parser.add_argument("--coverage", type=float, default=0.8, help="of their tokens, by the selected experts (0.8)")
    for name, value in {"rank": 8, "steps": 60, "controls": 3, "passes": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (0.002)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
