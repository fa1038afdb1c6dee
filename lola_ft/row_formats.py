"""Kinds of files, formats of rows, and each format's fields: what a recipe may name and what data reads."""

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

ROWS_OF_THEIR_OWN = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Kinds of files that no `unit` divides into rows."""
