"""Finding the rows that the sequences of a batch come from, by their tokens.

So training needs no extra data, although rows are packed, mixed and repeated. Finding rows reads the sources again,
which happens only when a run ends with an error.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lola_ft.data import Example, PromptTemplate, encode, encode_judged
from lola_ft.data.encoding import batches
from lola_ft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Document = tuple[int, ...]
"""Token ids of one sequence of a batch."""


def documents_of(inputs: dict[str, Any]) -> list[Document]:
    """Return the distinct sequences of a packed or padded batch, without padding."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    documents = list[Document]()
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        real = [True] * len(ids) if mask is None else mask[row].bool().tolist()
        starts = [place == 0 for place in range(len(ids))] if positions is None else (positions[row] == 0).tolist()
        document = list[int]()
        for token, is_real, starts_here in zip(ids, real, starts, strict=True):
            if starts_here or not is_real:
                documents.append(tuple(document))
                document = []
            if is_real:
                document.append(token)
        documents.append(tuple(document))
    return list(dict.fromkeys(document for document in documents if document))


def find_rows(
    documents: list[Document],
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerFast",
    template: PromptTemplate,
    max_length: int,
    overlong: str,
) -> list[str]:
    """Return the distinct places (`file:line`) of the examples that gave the sequences, in the sequences' order."""
    places: dict[Document, str] = {}
    wanted = set(documents)

    def encoded(rows: list[Example]) -> set[Document]:
        make = encode if rows[0].rejected is None and rows[0].desirable is None else encode_judged
        try:
            return set(map(tuple, _sequences(make(rows, tokenizer, template, max_length, overlong).dataset)))
        except DataError:  # none of these rows is kept
            return set()

    for batch in batches(examples):
        if encoded(batch) & (wanted - places.keys()):
            for example in batch:
                for document in encoded([example]) & (wanted - places.keys()):
                    places[document] = example.where
        if len(places) == len(wanted):
            break
    return list(dict.fromkeys(places[document] for document in documents if document in places))


def _sequences(dataset: "Dataset") -> list[list[int]]:
    """Return the token ids of every sequence; for judged answers, of the prompt with each answer."""
    if "prompt_ids" not in dataset.column_names:
        return list(dataset["input_ids"])
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in dataset.column_names]
    return [row["prompt_ids"] + row[name] for row in dataset for name in answers]
