"""Checkpoints and resuming: `contents.py` (what a checkpoint holds), `checkpoint.py` (the folder), `resume.py`."""
