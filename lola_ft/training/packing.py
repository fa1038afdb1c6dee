"""Sequences packed into rows, or as they are, ready before a trainer is built; mapped, not in memory.

TRL would prepare its data by itself and keep the result in memory: packed rows, and a copy of sequences that are cut
already and that it goes through one by one. Here packed rows are written to disk and mapped, and TRL is told
(`dataset_kwargs`) that nothing is left to do.
"""

import numpy as np
from datasets import Dataset
from datasets.table import InMemoryTable
from trl import pack_dataset

from lola_ft.data.encoded_cache import new_folder, table_file
from lola_ft.data.table_store import map_table
from lola_ft.recipe import Recipe
from lola_ft.training.dataset import RunData

READY = {"skip_prepare_dataset": True}
"""TRL's `dataset_kwargs` for datasets that come from here."""
STRATEGY = "bfd"
"""Best fit, decreasing, within a thousand rows at a time: no sequence is cut, none is read by another."""

_BATCH = 1000


def ready(dataset: Dataset, packing: bool, max_length: int) -> Dataset:
    """Return the rows of sequences that are encoded and cut, as TRL would prepare them.

    Without packing, sequences of one token, which nothing precedes, are left out; of all others a token is learned.
    """
    if packing:
        return pack(dataset, max_length)
    lengths = sequence_lengths(dataset)
    return dataset if (lengths > 1).all() else dataset.select(np.flatnonzero(lengths > 1))


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Sequences put together into rows, as TRL packs them, mapped from a file that is already gone.

    Args:
        dataset: Columns `input_ids` and `labels`; no sequence is longer than a row.
        max_length: Tokens of a row.

    Returns:
        The rows, with the length of each sequence in `seq_lengths`.

    Raises:
        UserError: There is no room on the disk.
    """
    with new_folder() as (folder, _):
        file = table_file(folder, "packed")
        settings = {"cache_file_name": str(file), "desc": "Packing"}
        packed = pack_dataset(dataset.select_columns(["input_ids", "labels"]), max_length, STRATEGY, settings)
        # The file will be gone, so nothing in the dataset may refer to its name: `datasets`' own mapping would open
        # the file again in another process, and derive files beside it.
        return Dataset(InMemoryTable(map_table(file)), info=packed.info, fingerprint=packed._fingerprint)


def filling_line(rows: Dataset, data: RunData, recipe: Recipe) -> str:
    """Say how many rows the trainer reads of `data`, packed or not, and how full a row or a micro batch is."""
    sequences, tokens = len(data.mix.dataset), data.mix.tokens
    if recipe.data.packing:
        full = tokens / (len(rows) * recipe.data.max_length)
        return f"{sequences:,} sequences are packed into {len(rows):,} rows, {full:.1%} full."
    line = f"{sequences:,} sequences, {tokens / sequences:.0f} tokens each on average, not packed"
    if recipe.objective != "sft":
        return f"{line}."
    micro = recipe.train.micro_batch_size
    share = share_of_tokens(sequence_lengths(rows), micro, recipe.train.seed)
    return f"{line}. Of micro batches of {micro}, {share:.1%} is tokens and not padding."


def share_of_tokens(lengths: np.ndarray, micro_batch_size: int, seed: int) -> float:
    """Return the share of tokens in padded micro batches of sequences of these lengths (N,), N > 0, in random order."""
    lengths = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(lengths), micro_batch_size)
    rows = np.diff(np.append(starts, len(lengths)))
    return float(lengths.sum() / (rows * np.maximum.reduceat(lengths, starts)).sum())


def sequence_lengths(dataset: Dataset, column: str = "input_ids") -> np.ndarray:
    """Return the tokens of each row in a column of token ids, in the dataset's order."""
    tables = dataset.select_columns(column).with_format("arrow").iter(_BATCH)
    lengths = [chunk.value_lengths().to_numpy() for table in tables for chunk in table[column].chunks]
    return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
