"""Fine-tune LOLA: `python finetune.py RECIPE [key=value …] [--dry-run] [--resume]`."""

import sys

from lola_ft.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
