"""The sizes of an NF4 weight's parts, for those who store one and those who plan for one."""

BLOCK = 64
ABSMAX_BLOCK = 256


def packed_sizes(numel: int) -> tuple[int, int, int]:
    """Lengths of `packed`, `absmax` and `absmax2` for a weight of `numel` values."""
    blocks = -(-numel // BLOCK)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)
