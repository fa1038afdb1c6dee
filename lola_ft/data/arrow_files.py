"""Rows of Parquet and Arrow files, and the files of a folder that `datasets` wrote (`save_to_disk`)."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lola_ft.data.rows import Findings, Row, Rows, Source
from lola_ft.data.text_lines import refuse_other_content
from lola_ft.errors import DataError, first_line

_BATCH = 1000
_DATASET_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"


def parquet_rows(path: Path, source: Source, findings: Findings) -> Rows:  # noqa: ARG001 - every reader has this signature
    """Read a Parquet file, a thousand rows at a time."""
    from pyarrow import parquet

    return _rows(path, "a Parquet", lambda: parquet.ParquetFile(path).iter_batches(_BATCH))


def arrow_rows(path: Path, source: Source, findings: Findings) -> Rows:  # noqa: ARG001 - every reader has this signature
    """Read an Arrow file, in the file format or the stream format (which `datasets` writes)."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                return iter(pyarrow.ipc.open_file(file).read_all().to_batches(_BATCH))
            file.seek(0)
            return iter(pyarrow.ipc.open_stream(file).read_all().to_batches(_BATCH))

    return _rows(path, "an Arrow", batches)


def _rows(path: Path, kind: str, batches: Callable[[], Iterable[Any]]) -> Rows:
    import pyarrow

    if path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if not (start := file.read(32)).startswith(b"PAR1"):
            refuse_other_content(path, start)
    try:
        index = 0
        for batch in batches():
            for fields in batch.to_pylist():
                yield Row(fields, f"{path}:[{index}]")
                index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as {kind} file: {first_line(error)}.") from None


def saved_files(folder: Path) -> list[Path] | None:
    """Return the files of a dataset that `save_to_disk` wrote into a folder, in order; None for any other folder.

    Raises:
        DataError: The folder has several splits, or its list of files is damaged.
    """
    if (folder / _SPLITS_FILE).is_file():
        splits = [split for split in sorted(folder.iterdir()) if (split / _DATASET_FILE).is_file()]
        if len(splits) != 1:
            names = ", ".join(split.name for split in splits) or "none"
            choice = f" Choose one, such as {splits[0]}." if splits else ""
            raise DataError(f"{folder}: a folder of `datasets` with several splits ({names}).{choice}")
        return saved_files(splits[0])
    if not (folder / _DATASET_FILE).is_file() or not any(folder.glob("*.arrow")):
        return None
    try:
        state = json.loads((folder / _DATASET_FILE).read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _DATASET_FILE}: damaged, so the dataset cannot be read: {error!r}.") from None
