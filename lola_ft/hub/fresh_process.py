"""Runs the check in a fresh process, so that nothing of this one's memory can stand in for what is on disk."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import lola_ft
from lola_ft.errors import PublishError
from lola_ft.hub.publication import Source


def check_in_fresh_process(source: Source, staged: Path, base: Path | None) -> str:
    """Compare the staged folder with its source; says in a sentence what was found.

    Raises:
        PublishError: If they differ, or the staged folder does not load.
    """
    _free_memory()
    command = [sys.executable, "-m", "lola_ft.hub.reload_check", source.kind, str(source.folder), str(staged)]
    if base is not None:
        command += ["--base", str(base)]
    package = str(Path(lola_ft.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode == 2:
        raise PublishError(result.stderr.strip().splitlines()[-1])
    if result.returncode != 0:
        raise PublishError(f"{source.folder}: the check before sending broke off; nothing was sent.\n{result.stderr}")
    found = json.loads(result.stdout.splitlines()[-1])
    return (
        f"Reloaded in a fresh process and compared with {source.folder} on {found['tokens']} tokens: largest logit "
        f"difference {found['max_logit_difference']:.3g} (largest logit {found['largest_logit']:.3g})."
    )


def _free_memory() -> None:
    """A run that just ended may hold its model; the check needs the place."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
