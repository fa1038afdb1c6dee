"""A prediction as tables and sentences."""

from collections.abc import Iterator

from rich.table import Table

from lola_ft.planning.fit import Change
from lola_ft.planning.job import Job
from lola_ft.planning.predict import Prediction
from lola_ft.planning.sizes import show_size

_WHERE = {"cuda": "GPU memory", "cpu": "memory"}


def memory_table(prediction: Prediction) -> Table:
    """Make a table of the bytes of each part at the peak."""
    table = Table(title=f"Peak {_WHERE[prediction.job.device]}", title_justify="left")
    for heading in ("part", "how"):
        table.add_column(heading)
    table.add_column("size", justify="right")
    for name, (how, size) in _rows(prediction):
        table.add_row(name, how, show_size(size))
    table.add_section()
    table.add_row("all", "", show_size(prediction.total))
    return table


def memory_lines(prediction: Prediction) -> list[str]:
    """Return the table of bytes at the peak as lines of text."""
    rows = [*_rows(prediction), ("all", ("", prediction.total))]
    return [f"  {name:12} {show_size(size):>12}  {how}".rstrip() for name, (how, size) in rows]


def _rows(prediction: Prediction) -> Iterator[tuple[str, tuple[str, int]]]:
    job, fixed = prediction.job, prediction.fixed
    sizes = prediction.parts
    formats = {kind for _, kind in fixed.base.counts}
    paged = f"; {show_size(fixed.optimizer.paged)} more is paged" if fixed.optimizer.paged else ""
    offloaded = "; experts: two layers at a time" if job.offload else ""
    how = {
        "weights": " and ".join(sorted(formats, key=lambda kind: kind != "nf4")) + offloaded,
        "adapter": f"{fixed.trained:,} trained parameters, float32",
        "reference": "frozen copy of the starting adapter, float32",
        "gradients": "float32",
        "optimizer": f"{job.optimizer}{'' if fixed.optimizer.exact else ', an estimate'}{paged}",
        "activations": f"{shape(job)}{', checkpointed' if job.checkpointing else ''}",
        "work space": f"during the {prediction.moment}, an estimate",
        "context": "CUDA and libraries, an estimate" if job.on_cuda else "Python and libraries, an estimate",
    }
    for name, size in sizes.items():
        yield name, (how[name], size)


def shape(job: Job) -> str:
    """Describe a micro batch in words, such as "4 rows of 1024 tokens, packed"."""
    name, each = ("row", "") if job.row_sequences == 1 else ("pair", f"{job.row_sequences} x ")
    rows = f"{job.micro_batch_size} {name}{'s' * (job.micro_batch_size > 1)} of {each}{job.length} tokens"
    return rows + ", packed" * job.packing


def verdict(prediction: Prediction, limit: int, change: Change | None) -> list[str]:
    """Return lines that say if the run fits and, if not, the overrides that would make it fit."""
    need, room = show_size(prediction.total), show_size(limit)
    if prediction.total <= limit:
        return [f"It fits: {need} of {room}."]
    lines = [f"It does not fit: it needs {need}, and there are {room}."]
    if change is None:
        hint = " Set base.quantization=nf4 first." if prediction.job.quantization is None else ""
        return [*lines, f"No smaller batch, length or rank makes it fit.{hint}"]
    return [
        *lines,
        f"Add this to the command to make it fit ({show_size(change.prediction.total)}):",
        f"  {' '.join(change.overrides)}",
    ]
