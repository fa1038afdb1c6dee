"""The command line's time to answer, as a share of the time of `import torch` on the same machine.

    python benchmarks/startup.py
    python benchmarks/startup.py --checkout ../another-version

The commands and the import take turns, each in its own process, and their medians are compared. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MISTAKE = "model:\n  base: some/base\nadapter:\n  rnak: 8\n"
RIGHT = """\
base: {{model: some/base}}
adapter: {{attention: {{rank: 8}}}}
data: {{sources: [{{path: rows.jsonl, format: alpaca}}]}}
output: {output}
"""


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "mistake.yaml"
        recipe.write_text(MISTAKE, encoding="utf-8")
        taken, run = Path(folder) / "taken.yaml", Path(folder) / "run"
        taken.write_text(RIGHT.format(output=run), encoding="utf-8")
        run.mkdir()
        (run / "recipe.yaml").touch()
        (run / "merged" / "earlier").mkdir(parents=True)
        seconds = measure(commands(args.checkout, str(recipe), str(taken), str(run)), args.checkout, args.repeats)
    torch = statistics.median(seconds.pop("import torch"))
    result = {
        "import_torch_s": round(torch, 3),
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "share_of_import_torch": {name: round(statistics.median(times) / torch, 3) for name, times in seconds.items()},
    }
    print(json.dumps(result))


def commands(checkout: Path, recipe: str, taken: str, run: str) -> dict[str, list[str]]:
    """Return the timed commands by name."""
    return {
        "import torch": ["-c", "import torch"],
        "--help": ["-m", "lola_ft", "--help"],
        "recipes list": ["-m", "lola_ft", "recipes", "list"],
        "a mistake, train": ["-m", "lola_ft", "train", recipe],
        "already holds a run": ["-m", "lola_ft", "train", taken],
        "merged already": ["-m", "lola_ft", "merge", run],
        "a mistake, preview": ["-m", "lola_ft", "preview", recipe],
        "a mistake, finetune.py": [str(checkout / "finetune.py"), recipe],
    }


def measure(runs: dict[str, list[str]], checkout: Path, repeats: int) -> dict[str, list[float]]:
    """Time each command `repeats` times, in turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    for turn in range(repeats + 1):
        for name, arguments in runs.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, cwd=checkout)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parents[1]
    parser.add_argument("--checkout", type=lambda text: Path(text).resolve(), default=here, help="code to measure")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
