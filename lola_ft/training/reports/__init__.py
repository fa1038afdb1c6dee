"""Reports that a run prints and leaves behind: tables, `metrics.jsonl`, the manifest and the card, pictures."""
