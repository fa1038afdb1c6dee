"""Checkpoints and resuming: `contents.py` (contents), `checkpoint.py` (the folder), `resume.py` (the restart)."""
