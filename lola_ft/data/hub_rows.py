"""Rows of a dataset on the Hub, at the commit that was current when the run began."""

from pathlib import Path
from typing import Any

from lola_ft.data.rows import Row, Rows, Source
from lola_ft.errors import DataError, first_line
from lola_ft.repo_id import is_commit


def commit_of(hub: str, revision: str | None) -> str | None:
    """Return the commit that a dataset's branch or tag names now.

    Returns None for a folder, and if the Hub cannot be reached; then the local cache decides.
    """
    if is_commit(revision):
        return revision
    if Path(hub).is_dir():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub, revision=revision, timeout=10).sha
    except Exception:  # any error of the network: loading then reports it, or finds a cached copy
        return None


def hub_rows(source: Source) -> Rows:
    """Load the rows of a split after a download or, with streaming, one by one as they are read."""
    assert source.hub is not None, "a source of the Hub has an id"
    if Path(source.hub).is_file():
        raise DataError(
            f"{source.hub}: is a local file, not a dataset on the Hub. Write `path: {source.hub}` in place of `hub`."
        )
    if "://" in source.hub:
        raise DataError(f"{source.hub}: is a web address. Write the dataset's id: `hub: owner/name`.")
    import datasets

    try:
        rows = datasets.load_dataset(
            source.hub,
            source.subset,
            split=source.split or "train",
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:
        raise _failed(source, error, "cannot be loaded from the Hub") from None
    return _numbered(rows, source)


def _numbered(rows: Any, source: Source) -> Rows:
    """Number the rows. A connection that breaks half-way raises a DataError, because it is not a bug."""
    iterator = enumerate(rows)
    while True:
        try:
            index, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _failed(source, error, "cannot be read to its end") from None
        yield Row(dict(row), f"{source.name}:[{index}]")


def _failed(source: Source, error: Exception, what: str) -> DataError:
    """Return the error for any exception of `datasets`, of the network or of a dataset's files."""
    return DataError(f"{source.name}: {what}: {first_line(error)}")
