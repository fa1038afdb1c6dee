"""Data: from files in many languages to the token ids a model learns from, with nothing lost in silence."""

from lola_ft.data.encoding import Encoded, encode, encode_texts
from lola_ft.data.formats import Example, read_examples, to_example
from lola_ft.data.report import Counts, EncodingReport
from lola_ft.data.sources import Row, Source, read_rows
from lola_ft.data.split import is_validation, split_validation
from lola_ft.data.templates import Template

__all__ = [
    "Counts",
    "Encoded",
    "EncodingReport",
    "Example",
    "Row",
    "Source",
    "Template",
    "encode",
    "encode_texts",
    "is_validation",
    "read_examples",
    "read_rows",
    "split_validation",
    "to_example",
]
