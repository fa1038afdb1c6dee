"""Packing: several sequences share a row, so that a batch has almost no padding.

An example with rows of 8 tokens. Sequences of 5, 4, 3, 2 and 2 tokens are taken longest first, and each is put into the
row with the least room that still fits it (best fit, decreasing):

    row 0   a a a a a c c c     seq_lengths [5, 3]       position_ids 0 1 2 3 4 0 1 2
    row 1   b b b b d d e e     seq_lengths [4, 2, 2]    position_ids 0 1 2 3 0 1 0 1

Two full rows take the place of five padded ones (5 · 5 = 25 positions for 16 tokens). Positions begin at 0 in every
sequence, and attention and the loss never cross from one sequence into another.

TRL would prepare its data by itself and keep packed rows and copies in memory. Here packed rows are written to disk and
mapped, before the trainer is built, and TRL is told (`dataset_kwargs`) that the data is ready.
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
"""TRL's `dataset_kwargs` for datasets that this module has prepared."""
STRATEGY = "bfd"
"""TRL's name of best fit, decreasing, within a thousand sequences at a time. No sequence is cut."""

_BATCH = 1000


def ready(dataset: Dataset, packing: bool, max_length: int) -> Dataset:
    """Return the rows of encoded sequences, as TRL would prepare them.

    Without packing, sequences of one token are left out: no token precedes it, so nothing would be learned.
    """
    if packing:
        return pack(dataset, max_length)
    lengths = sequence_lengths(dataset)
    return dataset if (lengths > 1).all() else dataset.select(np.flatnonzero(lengths > 1))


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Pack sequences into rows with TRL's algorithm; the rows are mapped from a file that is then deleted.

    Args:
        dataset: Columns `input_ids` and `labels`; no sequence is longer than `max_length`.
        max_length: Tokens per row.

    Returns:
        The rows, with the lengths of their sequences in the column `seq_lengths`.

    Raises:
        UserError: The disk is full.
    """
    with new_folder() as (folder, _):
        file = table_file(folder, "packed")
        settings = {"cache_file_name": str(file), "desc": "Packing"}
        packed = pack_dataset(dataset.select_columns(["input_ids", "labels"]), max_length, STRATEGY, settings)
        # Deleting the file leaves the mapping valid on Linux. But the dataset must not know the file's name: `datasets`
        # would open it again in another process, or write files beside it. So it is given as a table in memory.
        return Dataset(InMemoryTable(map_table(file)), info=packed.info, fingerprint=packed._fingerprint)


def filling_line(rows: Dataset, data: RunData, recipe: Recipe) -> str:
    """Return a line for the user: the number of rows to train on, and how full a row or a micro batch is."""
    sequences, tokens = len(data.mix.dataset), data.mix.tokens
    if recipe.data.packing:
        full = tokens / (len(rows) * recipe.data.max_length)
        return f"{sequences:,} sequences are packed into {len(rows):,} rows, which are {full:.1%} full."
    line = f"{sequences:,} sequences of {tokens / sequences:.0f} tokens on average, not packed"
    if recipe.objective != "sft":
        return f"{line}."
    micro = recipe.train.micro_batch_size
    share = share_of_tokens(sequence_lengths(rows), micro, recipe.train.seed)
    return f"{line}. Micro batches of {micro} are {share:.1%} tokens; the remainder is padding."


def share_of_tokens(lengths: np.ndarray, micro_batch_size: int, seed: int) -> float:
    """Return the share of tokens in padded micro batches of sequences in random order.

    Args:
        lengths: Tokens per sequence (N,), N > 0.
    """
    lengths = np.random.default_rng(seed).permutation(lengths)
    # M micro batches: the first sequence of each (M,), and the number of sequences in each (M,), smaller in the last.
    starts = np.arange(0, len(lengths), micro_batch_size)
    rows = np.diff(np.append(starts, len(lengths)))
    # A padded micro batch takes its rows times its longest sequence.
    return float(lengths.sum() / (rows * np.maximum.reduceat(lengths, starts)).sum())


def sequence_lengths(dataset: Dataset, column: str = "input_ids") -> np.ndarray:
    """Return the number of tokens per row (N,) in a column of token ids, in the dataset's order."""
    tables = dataset.select_columns(column).with_format("arrow").iter(_BATCH)
    lengths = [chunk.value_lengths().to_numpy() for table in tables for chunk in table[column].chunks]
    return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
