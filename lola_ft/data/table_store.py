"""A table that grows batch by batch, in memory or in an Arrow file that is mapped when it is complete."""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pyarrow


class TableSink:
    """Collects tables with the same columns, one after another.

    Attributes:
        table: All tables joined, available after the `with` block.
    """

    table: "pyarrow.Table"

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._chunks: list[pyarrow.Table] = []
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def write(self, table: "pyarrow.Table") -> None:
        """Add a table at the end."""
        import pyarrow

        if self._file is None:
            self._chunks.append(table)
            return
        if self._writer is None:
            self._writer = pyarrow.ipc.new_stream(str(self._file), table.schema)
        self._writer.write_table(table)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import pyarrow

        if self._writer is not None:
            self._writer.close()
        if kind is None and self._writer is not None:
            assert self._file is not None, "a writer has a file"
            self.table = map_table(self._file)
        elif kind is None and self._chunks:
            self.table = pyarrow.concat_tables(self._chunks)


def map_table(file: Path) -> "pyarrow.Table":
    """Map a table from a file. Its pages count as the file's cache, not as the process's own memory."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
