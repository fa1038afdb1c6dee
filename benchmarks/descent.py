"""Test of nano bases' routing against the descent of languages: `python benchmarks/descent.py --help`

One pre-training is one sample, because another start and another order of the text give other routers. So nano bases
of several seeds are tested, and for each an untrained base of the same seed, whose routing can only follow tokens.
Prints a table, then one JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from lola_ft.model import LolaConfig, LolaForCausalLM
from lola_ft.nano import build_nano
from lola_ft.nano.build import NanoSettings
from lola_ft.nano.corpus import KINDS, write_texts
from lola_ft.nano.pretrain import PretrainSettings
from lola_ft.routing import follow_descent, profile_routing

TESTS = ("family", "script", "tokens", "family given script", "family given tokens", "family given script and tokens")


def main() -> None:
    args = parse()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        write_texts(Path(temporary) / "texts", kind=args.text)
        for seed in range(args.seeds):
            settings = NanoSettings(pretrain=PretrainSettings(seed=seed))
            trained = build_nano(f"{args.base}-{seed}" if seed else args.base, settings)
            bases = {"trained": trained, "untrained": untrained(trained, Path(temporary) / f"{seed}", settings)}
            for kind, base in bases.items():
                rows.append({"base": kind, "seed": seed} | measure(base, Path(temporary) / "texts", args.permutations))
                print(json.dumps(rows[-1]), flush=True)
    Console().print(table(rows))
    print(json.dumps({"result": rows, "shape": vars(args)}))


def untrained(trained: Path, folder: Path, settings: NanoSettings) -> Path:
    """Write the same base before training, with the same tokenizer."""
    torch.manual_seed(settings.pretrain.seed)
    model = LolaForCausalLM(LolaConfig.from_pretrained(trained))
    torch.nn.init.normal_(model.transformer.wte.weight, std=settings.embedding_std)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


def measure(base: Path, texts: Path, permutations: int) -> dict[str, Any]:
    """Return Mantel's tests of all layers together, and the share of languages whose nearest language is a relative."""
    found = follow_descent(profile_routing(base, [texts], quantization=None), permutations)
    assert found, "the nano base's text has languages of many families"
    tests = found["layers"]["all"]
    return {name: tests["mantel"][name] for name in TESTS} | {"neighbours": tests["neighbours"]}


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="Distance of routing against that of …: Mantel's r (p)", title_justify="left")
    for heading in ("base", "seed", *TESTS, "nearest of one family (chance)"):
        made.add_column(heading)
    for row in rows:
        near = row["neighbours"]["family"]
        cells = [f"{row[name]['r']:.3f} ({row[name]['p']:.3f})" for name in TESTS]
        made.add_row(row["base"], str(row["seed"]), *cells, f"{near['share']:.1%} ({near['chance']:.1%})")
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=".cache/nano", help="of seed 0; built there if it is not, others beside it")
    parser.add_argument("--text", default="declaration", choices=KINDS, help="that is profiled (declaration)")
    parser.add_argument("--seeds", type=int, default=3, help="bases to train (3)")
    parser.add_argument("--permutations", type=int, default=9999, help="(9999)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
