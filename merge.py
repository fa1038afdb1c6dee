"""Merge an adapter: `python merge.py RUN_OR_ADAPTER [--base BASE] [--out DIR] [--dtype …] [--rounding base|nf4]`."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in finetune.py

from lola_ft.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
