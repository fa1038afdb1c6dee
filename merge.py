"""Merge an adapter: `python merge.py RUN_OR_ADAPTER [--base BASE] [--out DIR] [--dtype …] [--rounding base|nf4]`."""

import sys

from lola_ft.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
