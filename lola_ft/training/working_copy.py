"""Which state of the code a run was started from, if its working directory is a git checkout."""

import subprocess
from typing import Any


def git_state() -> dict[str, Any] | None:
    """The commit and whether tracked files differ from it; None outside of a checkout or without git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
