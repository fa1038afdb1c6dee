"""What a run trains, said before it starts."""

from collections import defaultdict

from rich.table import Table
from torch import nn

GROUPS = (
    ("attention", (".attn.", ".self_attention.")),
    ("mlp", (".mlp.",)),
    ("experts", (".experts.",)),
    ("router", (".gate.",)),
    ("norms", (".ln_",)),
    ("biases", (".trained_bias.",)),
)


def count_trainable(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(tensors, parameters) that are trained, by group."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Last first: a bias lies in a module of another group.
            group = next(label for label, markers in reversed(GROUPS) if any(marker in name for marker in markers))
            tensors, parameters = counts[group]
            counts[group] = (tensors + 1, parameters + parameter.numel())
    return dict(counts)


def trainable_table(counts: dict[str, tuple[int, int]], ranks: dict[str, int]) -> Table:
    """The table printed at the start; groups without an adapter are shown as frozen."""
    table = Table(title="What is trained", title_justify="left")
    table.add_column("group")
    table.add_column("how")
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for group, _ in GROUPS:
        tensors, parameters = counts.get(group, (0, 0))
        rank = ranks.get(group)
        how = f"LoRA rank {rank}" if rank else "tuned" if tensors else "frozen"
        table.add_row(group, how, f"{tensors:,}", f"{parameters:,}")
    table.add_section()
    table.add_row("all", "", *(f"{sum(column):,}" for column in zip(*counts.values(), strict=True)))
    return table
