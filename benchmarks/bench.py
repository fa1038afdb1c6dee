"""The CPU's benchmarks, one after another: `make bench`. Writes a table and a plot to a folder (bench/).

Each benchmark runs in its own process. Shapes and repetitions take less than ten minutes in all on two idle cores.
Speeds of different runs cannot be compared, but ratios within a run can.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_HERE = Path(__file__).parent
RUNS = {
    "whole_step": ["whole_step.py", "--layers", "4", "--steps", "5", "--warmup", "1"],
    "roofline": ["roofline.py", "--layers", "2", "--steps", "5", "--warmup", "1", "--beside", "olmoe"],
    "families": ["families.py", "--families", "olmoe", "--layers", "1", "--steps", "3", "--warmup", "1"],
    "long_run": ["long_run.py", "--layers", "1", "--steps", "60", "--warmup", "20", "--seq", "256", "--batch", "2"],
    "experts": ["experts.py"],
    "scaling": ["scaling.py", "--layers", "2", "--steps", "3"],
    "decode": ["decode.py"],
    "load": ["load.py", "--layers", "2"],
    "merge": ["merge.py", "--layers", "2"],
    "startup": ["startup.py"],
}


def main() -> None:
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, began = {}, time.perf_counter()
    for name in args.only or RUNS:
        results[name] = run(RUNS[name])
        print(f"{name}: {results[name]['seconds_in_all']} s", flush=True)
        (out / "bench.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(
        ["| figure | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in figures(results))]
    )
    (out / "bench.md").write_text(table + "\n", encoding="utf-8")
    if "scaling" in results:
        plot(results["scaling"], out / "scaling.png")
    print(table)
    print(f"{time.perf_counter() - began:.0f} s in all; written to {out}.")


def run(command: list[str]) -> dict[str, Any]:
    """Run a benchmark and return the JSON of its last line."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(_HERE / command[0]), *command[1:]], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds_in_all": round(time.perf_counter() - began, 1)}


def figures(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the most important figures, with a description of each."""
    found: list[tuple[str, Any]] = []
    if whole := results.get("whole_step"):
        found += [
            ("training step of 4 layers, tokens/s", whole["tokens_per_s"]["ours"]),
            ("times faster than a module an expert with PEFT", whole["times_faster"]),
            ("its memory, as a share of theirs", whole["share_of_their_memory"]),
        ]
    if roof := results.get("roofline"):
        found += [
            ("share of the step's own matrix products alone", roof["share"]),
            ("the same share of OLMoE (64 experts, 8 per token), as a multiple", roof["share_beside"]),
        ]
    if families := results.get("families"):
        olmoe = families["olmoe"]
        found += [
            ("OLMoE: times faster than stock transformers with PEFT", olmoe["times_faster"]),
            ("OLMoE: memory, as a share of theirs", olmoe["share_of_their_memory"]["whole"]),
        ]
    if long := results.get("long_run"):
        found += [
            ("batches of changing length: growth of memory", long["ways"]["few lengths"]["growth"]),
            ("batches of changing length: few lengths, times faster", long["few_lengths_are_times_faster"]),
        ]
    if experts := results.get("experts"):
        found += [(f"MoE layer, times ours: {name}", value) for name, value in experts["times_ours"].items()]
    if scaling := results.get("scaling"):
        for series in ("experts", "rank", "tokens", "expert_lora"):
            found += [(f"step, {series} {name}", f"{point['times']} times") for name, point in scaling[series].items()]
    if decoding := results.get("decode"):
        found.append(("decoding, 64 experts over 16", decoding["ratio"]))
    if load := results.get("load"):
        found.append(("loading over quantising alone", load["load_over_quantising_alone"]))
    if merge := results.get("merge"):
        found.append(("merge over a copy", merge["ratio"]))
    if startup := results.get("startup"):
        found += [(f"{name}, over import torch", share) for name, share in startup["share_of_import_torch"].items()]
    return found


def plot(scaling: dict[str, Any], path: Path) -> None:
    """Plot the three series, each as a multiple of its first value."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), sharey=True)
    for axes, series in zip(panels, ("experts", "rank", "tokens"), strict=True):
        points = sorted((int(name), point["times"]) for name, point in scaling[series].items())
        axes.plot([x for x, _ in points], [y for _, y in points], "o-")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(series)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of the same tokens")
    panels[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench", help="folder for table, plot and numbers (default: bench)")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="some of them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
