"""Reports that a run prints and writes: tables, `metrics.jsonl`, the manifest, the card and plots."""
