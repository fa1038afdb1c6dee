"""Rows of a dataset on the Hub, at the commit that was found when the run began."""

from pathlib import Path
from typing import Any

from lola_ft.data.rows import Row, Rows, Source
from lola_ft.errors import DataError, first_line
from lola_ft.repo_id import is_commit


def commit_of(hub: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a dataset stands for now; None if the Hub cannot be asked (then the cache
    decides), and for a folder."""
    if is_commit(revision):
        return revision
    if Path(hub).is_dir():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub, revision=revision, timeout=10).sha
    except Exception:  # whatever the network raises; loading then says what is wrong, or finds a cached copy
        return None


def hub_rows(source: Source) -> Rows:
    """Load the rows of a split: after a download or, with streaming, as they are needed."""
    assert source.hub is not None, "a source of the Hub has an id"
    if Path(source.hub).is_file():
        raise DataError(
            f"{source.hub}: a file here, not a dataset on the Hub. Write `path: {source.hub}` in place of `hub`."
        )
    if "://" in source.hub:
        raise DataError(f"{source.hub}: an address. Write the dataset's id: `hub: owner/name`.")
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
    """Rows with their number; a connection that breaks half-way is the user's to know, not a bug."""
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
    """The message for whatever `datasets`, the network or a dataset's files raise."""
    return DataError(f"{source.name}: {what}: {first_line(error)}")
