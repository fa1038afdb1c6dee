"""What a run's metrics say of its routers at the end, for the manifest and the card."""

from typing import Any

_LAST = {
    "router_min_entropy": "lowest load entropy of a layer",
    "router_max_share": "largest share of an expert",
    "router_dead": "experts without tokens",
}


def routing_results(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The measures of the last line that has them, and how far choices have moved; {} if nothing was measured."""
    loads = [line for line in metrics if "router_min_entropy" in line]
    found: dict[str, Any] = {said: loads[-1][key] for key, said in _LAST.items()} if loads else {}
    if loads:
        found["tokens these were measured on"] = loads[-1]["router_tokens"]
    flips = [line["router_flip_rate"] for line in metrics if "router_flip_rate" in line]
    if flips:
        found["choices of experts on a probe text that differ from the base's"] = flips[-1]
    return found
