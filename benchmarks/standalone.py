"""An exported LOLA on several versions of transformers, and the native class: `python benchmarks/standalone.py`.

    python benchmarks/standalone.py --pythons OLD/bin/python NEW/bin/python

Each Python loads the same exported folder of random weights with the code in it, in a process without lola_ft, and
generates. The Python that runs this script does the same with lola_ft's class, first and last. Logits are compared with
the native class's. Prints one JSON line last.
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
from typing import Any

# The script of each process. It imports only torch and transformers, and lola_ft if asked to.
LOAD_AND_GENERATE = """
import json, sys, time
folder, out, native = sys.argv[1], sys.argv[2], sys.argv[5] == "native"
tokens, rounds, batches = int(sys.argv[3]), int(sys.argv[4]), list(map(int, sys.argv[6].split(",")))
import torch, transformers
from safetensors.torch import save_file
if native:
    import lola_ft
from transformers import AutoModelForCausalLM
options = {} if native else {"trust_remote_code": True}
loads = []
for _ in range(2):  # the second one finds modules imported and files read
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, **options).eval()
    loads.append(time.perf_counter() - began)
ids = torch.randint(6, model.config.vocab_size, (max(2, *batches), 64), generator=torch.Generator().manual_seed(0))
speeds = {}
with torch.no_grad():
    logits = model(ids[:2]).logits
    for batch in batches:
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            made = model.generate(
                ids[:batch, :16], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=1,
                attention_mask=torch.ones(batch, 16, dtype=torch.long),
            )
            seconds.append(time.perf_counter() - began)
            assert made.shape == (batch, 16 + tokens)
        speeds[batch] = [batch * tokens / one for one in seconds[1:]]
save_file({"logits": logits.contiguous()}, out)
print(json.dumps({
    "transformers": transformers.__version__, "class": type(model).__module__.split(".")[0], "load_s": loads,
    "tokens_per_s": speeds, "lola_ft": "lola_ft" in sys.modules,
}))
"""


def main() -> None:
    from random_checkpoint import write_checkpoint
    from torch import bfloat16

    from lola_ft.families import LOLA
    from lola_ft.standalone.export import export

    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "base").mkdir()
        sizes = {"n_embd": args.hidden, "n_head": args.heads, "n_inner": 4 * args.hidden, "vocab_size": args.vocab}
        write_checkpoint(root / "base", bfloat16, args.layers, num_experts=args.experts, **sizes)
        export(root / "base", root / "lola")
        code = sorted({f"{name.partition('.')[0]}.py" for name in LOLA.auto_map.values()})
        files = {name: (root / "lola" / name).stat().st_size for name in code}
        runs = [
            (sys.executable, True),
            *((Path(python).absolute(), False) for python in args.pythons),
            (sys.executable, True),
        ]
        found = [run(python, native, root, args) for python, native in runs]
    first, last = found[0]["tokens_per_s"], found[-1]["tokens_per_s"]
    native = {batch: statistics.median([*first[batch], *last[batch]]) for batch in first}
    result = {
        "bytes": files,
        "native": summary(found[0], native),
        "with_its_own_code": [
            summary(one, native) | {"largest_logit_difference": difference(one, found[0])} for one in found[1:-1]
        ],
        "wanted": {"largest_logit_difference": 1e-4, "native_is_times_faster": 1.5},
        "load_average": os.getloadavg()[0],
        "shape": {key: value for key, value in vars(args).items() if key != "pythons"},
    }
    print(json.dumps(result))


def run(python: str, native: bool, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load and generate in a separate process; return its output and its logits."""
    from safetensors.torch import load_file

    out = root / "logits.safetensors"
    hidden = () if native else ("PYTHONPATH",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    kind = "native" if native else "own code"
    command = [python, "-c", LOAD_AND_GENERATE, root / "lola", out, args.tokens, args.rounds, kind]
    command.append(",".join(map(str, args.batch)))
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lola_ft"] == native, "a process without lola_ft has found it, or one with it has not"
    return found | {"whole_s": time.perf_counter() - began, "logits": load_file(out)["logits"]}


def summary(found: dict[str, Any], native: dict[str, float]) -> dict[str, Any]:
    """Return medians by batch size, and how many times faster the native class generates."""
    speed = {batch: statistics.median(rounds) for batch, rounds in found["tokens_per_s"].items()}
    return {
        "transformers": found["transformers"],
        "load_s": [round(seconds, 2) for seconds in found["load_s"]],
        "tokens_per_s": {batch: round(value, 1) for batch, value in speed.items()},
        "spread": {batch: [round(min(r), 1), round(max(r), 1)] for batch, r in found["tokens_per_s"].items()},
        "native_is_times_faster": {batch: round(native[batch] / value, 2) for batch, value in speed.items()},
    }


def difference(one: dict[str, Any], native: dict[str, Any]) -> float:
    return float((one["logits"] - native["logits"]).abs().max())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters with transformers")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes of generation")
    parser.add_argument("--tokens", type=int, default=64, help="generated each time")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
