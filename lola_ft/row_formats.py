"""Kinds of files, formats of rows, and the fields of each format, for recipes and for reading data."""

from pathlib import PurePath

FORMAT_FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion", "system"),
    "text": ("text",),
    "messages": ("messages", "system", "tools"),
    "classification": ("text", "text_pair", "label"),
    "translation": ("source", "target", "source_language", "target_language"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
}
"""The fields of each format by their standard names."""

MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "weight", "tool_calls", "function_call", "tool_call_id", "name"}
)
"""The keys of a message that formats with messages read."""

JSON_FILES, TEXT_TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
ROWS_OF_THEIR_OWN = (*JSON_FILES, *TEXT_TABLES, ".parquet", ".arrow")
"""Kinds of files that have rows already, so that `unit` does not apply."""

_PACKED = (".gz", ".zst")
"""Endings of compressed files, which follow the ending of the file inside."""


def kind_of_file(path: str) -> str:
    """Return the ending of a file's kind in lower case, such as `.jsonl` for `a.JSONL.gz`; "" without an ending."""
    name = PurePath(path)
    if name.suffix.lower() in _PACKED:
        name = name.with_suffix("")
        return (
            "" if name.suffix.lower() in (".parquet", ".arrow") else name.suffix.lower()
        )  # these cannot be read from a stream
    return name.suffix.lower()
