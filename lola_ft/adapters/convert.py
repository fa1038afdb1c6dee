"""Conversion of an adapter to another layout."""

from dataclasses import dataclass
from pathlib import Path

from lola_ft.adapters.on_disk import read_adapter, write_adapter
from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import GENERATION_FILE, TOKENIZER_FILES
from lola_ft.files import check_new_folder, copy_files


@dataclass(frozen=True)
class Conversion:
    """The layout that an adapter was converted from, and the number of its tensors."""

    source_layout: str
    tensors: int


def convert_adapter(adapter: str | Path, base: str | Path, layout: str, out: str | Path) -> Conversion:
    """Write an adapter to `out` in `layout`, with bit-equal numbers. Tokenizer and template are copied, too.

    Args:
        base: The adapter's base, which gives the number of experts. The adapter must fit it.

    Raises:
        AdapterError: If the adapter does not fit the base, or the layout cannot hold it.
    """
    check_new_folder(out)
    checkpoint = BaseCheckpoint.open(base)
    stored = read_adapter(adapter)
    weights = stored.weights(checkpoint.architecture)
    weights.check_fit()
    if Path(weights.base).exists() or weights.base.startswith((".", "/", "~")):
        weights.base, weights.revision = "", None  # a local path means nothing on other machines

    if layout == "peft":
        weights.base_biases |= {name: checkpoint.entries[name].read() for name in weights.untrained_biases()}

    def copy_companions(folder: Path) -> None:
        copy_files(stored.folder, folder, (*TOKENIZER_FILES, "*.jinja", GENERATION_FILE))

    write_adapter(weights, out, layout, also=copy_companions)
    return Conversion(stored.layout, len(stored.entries))
