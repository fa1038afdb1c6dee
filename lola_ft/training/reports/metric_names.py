"""Names in `metrics.jsonl` that trainers and guards write and that plots, the manifest and others read.

`a/b` in a log line becomes b within a in the file: one object for all languages, or for all layers.
"""

BY_LANGUAGE = "eval_loss_by_language"
ENTROPY, SHARE, DEAD = "router_load_entropy", "router_largest_share", "router_dead_experts"
FLIP_RATE = "router_flip_rate"


def losses_by_language(metrics: dict[str, float]) -> dict[str, float]:
    """Return the losses of an evaluation's metrics by language code."""
    return {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{BY_LANGUAGE}/")}
