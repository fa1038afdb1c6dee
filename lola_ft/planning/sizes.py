"""Sizes of memory as text, such as 8GB."""

import re

from lola_ft.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `8GB` (10^9) or `8GiB` (2^30).

    Raises:
        UserError: The text is not a size, or is 0.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS or not (size := int(float(match[1]) * _UNITS[unit])):
        raise UserError(f"'{text}' is not a size of memory. Write it as 8GB, 24GiB or 900MB.")
    return size


def show_size(num_bytes: int) -> str:
    """Return a size as text: `12.34 GB`, `5.6 MB` or `789 bytes`."""
    for unit, size, digits in (("GB", 10**9, 2), ("MB", 10**6, 1)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.{digits}f} {unit}"
    return f"{num_bytes:,} bytes"
