"""A check, in a separate process, that the files to send give the same logits as the trained model.

    python -m lola_ft.hub.reload_check adapter SOURCE STAGED --base FOLDER
    python -m lola_ft.hub.reload_check merged SOURCE STAGED

loads both folders from disk, one after the other, and prints one line of JSON with the largest difference of their
logits and the largest logit.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lola_ft
from lola_ft.adapters import load_adapter
from lola_ft.adapters.on_disk import read_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.errors import PublishError, UserError
from lola_ft.families import architecture_of
from lola_ft.hub.publication import Source
from lola_ft.kernels.precision import comparison_dtype, is_small
from lola_ft.quantization import load_base
from lola_ft.quantization.load import default_device

_ROWS, _LENGTH = 6, 32
# Tolerances as a share of the largest logit. Both sides compute the same, so only kernels that sum in varying order
# make a difference, of about one rounding of the number format.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Comparison:
    """The number of tokens compared, and the differences of their logits."""

    tokens: int
    max_logit_difference: float
    largest_logit: float


def compare_adapter(base: Path, source: Path, staged: Path) -> Comparison:
    """Compare the base's logits with the trained adapter and with the adapter to send.

    Raises:
        PublishError: The logits differ, or the adapter changes nothing.
        AdapterError: One of the adapters does not fit the base.
    """
    quantization, dtype = _how_to_load(base)
    if read_adapter(source).starts_at_rounding_error:
        quantization = "nf4"  # this adapter cannot be loaded onto other weights
    model = load_base(base, quantization=quantization, dtype=dtype, quiet=True)
    plain = _logits(model)
    expected = _logits(load_adapter(model, source))
    del model
    model = load_base(base, quantization=quantization, dtype=dtype, quiet=True)
    actual = _logits(load_adapter(model, staged))
    if torch.equal(plain, actual):
        raise PublishError(
            f"{source}: the adapter changes nothing: the base without it gives the same logits. Was it trained?"
        )
    return _compare(expected, actual, dtype)


def compare_merged(source: Path, staged: Path) -> Comparison:
    """Compare the logits of the merged model and of the files to send; raises PublishError if they differ."""
    quantization, dtype = _how_to_load(source)
    expected = _logits(load_base(source, quantization=quantization, dtype=dtype, quiet=True))
    actual = _logits(load_base(staged, quantization=quantization, dtype=dtype, quiet=True))
    return _compare(expected, actual, dtype)


def _how_to_load(folder: Path) -> tuple[str | None, torch.dtype]:
    entries = BaseCheckpoint.open(folder).entries.values()
    numel = sum(entry.num_bytes // entry.dtype.itemsize for entry in entries)
    # A large model is loaded in 4 bit, so that the check fits on the machine of the training.
    return None if is_small(numel) else "nf4", comparison_dtype(numel, torch.bfloat16, default_device())


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Return logits (R, S, V) in float32, for ids spread over the vocabulary."""
    model.eval()
    sizes = architecture_of(model.config).sizes
    length = min(_LENGTH, sizes.positions)
    ids_RS = torch.tensor([[(1009 * row + 7919 * i) % sizes.vocab for i in range(length)] for row in range(_ROWS)])
    return model(ids_RS.to(next(model.parameters()).device)).logits.float().cpu()


def _compare(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> Comparison:
    difference, largest = (expected - actual).abs().max().item(), expected.abs().max().item()
    if not difference <= _TOLERANCE[dtype] * largest:  # NaN also fails the comparison
        raise PublishError(
            f"The files to send do not compute the same as the trained model: logits differ by {difference:.3g} "
            f"(largest {largest:.3g}). Nothing was sent."
        )
    return Comparison(expected.shape[0] * expected.shape[1], difference, largest)


def main() -> None:
    """Compare and print one line of JSON; an error prints one message on stderr and exits with code 2."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("adapter", "merged"))
    parser.add_argument("source", type=Path)
    parser.add_argument("staged", type=Path)
    parser.add_argument("--base", type=Path)
    given = parser.parse_args()
    try:
        folders = given.source, given.staged
        found = compare_adapter(given.base, *folders) if given.kind == "adapter" else compare_merged(*folders)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()


def check_in_fresh_process(source: Source, staged: Path, base: Path | None) -> str:
    """Compare the staged folder with its source in a new process; returns a sentence with the result.

    A new process reads everything from disk, so that nothing in this process's memory can hide a wrong file.
    """
    gc.collect()  # frees the model of a run that just ended, because the check needs the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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
        raise PublishError(f"{source.folder}: the check before sending failed; nothing was sent.\n{result.stderr}")
    found = json.loads(result.stdout.splitlines()[-1])
    return (
        f"Reloaded in a fresh process and compared with {source.folder} on {found['tokens']} tokens: largest logit "
        f"difference {found['max_logit_difference']:.3g} (largest logit {found['largest_logit']:.3g})."
    )
