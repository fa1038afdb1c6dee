"""Kinds of files, formats of rows, and each format's fields: what a recipe may name and what data reads."""

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
"""Keys of a message that the formats with messages read."""

JSON_FILES, TEXT_TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
ROWS_OF_THEIR_OWN = (*JSON_FILES, *TEXT_TABLES, ".parquet", ".arrow")
"""Kinds of files that no `unit` divides into rows."""

_PACKED = (".gz", ".zst")
"""Endings of packed files, behind that of the file inside."""


def kind_of_file(path: str) -> str:
    """Return the ending that says what a file holds, in small letters: `.jsonl` of `a.JSONL.gz`; "" without one."""
    name = PurePath(path)
    if name.suffix.lower() in _PACKED:
        name = name.with_suffix("")
        return "" if name.suffix.lower() in (".parquet", ".arrow") else name.suffix.lower()  # not read from a stream
    return name.suffix.lower()
