"""Fine-tune LOLA: `python finetune.py RECIPE [key=value …] [--dry-run] [--resume]`."""

import os
import sys

# Set before torch starts its threads, so that waiting threads sleep. Spinning threads slow a step tenfold on a machine
# that other programs use too; on an idle machine sleeping costs nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lola_ft.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
