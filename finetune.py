"""Fine-tune LOLA: `python finetune.py RECIPE [key=value …] [--dry-run] [--resume]`."""

import os
import sys

# Before torch starts its threads: waiting ones sleep. On a machine that others use too, spinning ones slow a step
# tenfold; on an idle one nothing is lost.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lola_ft.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
