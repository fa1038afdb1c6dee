"""Data: files in many languages become token ids for training. Every row left out is counted and reported."""

from lola_ft.data.bad_rows import BadRows
from lola_ft.data.chat_source import chat_source
from lola_ft.data.chat_template import CHAT, ChatTemplate, PromptTemplate, check_template, load_template
from lola_ft.data.duplicates import LeakCheck, hold_out, is_validation, without_duplicates
from lola_ft.data.encoding import Encoded, encode
from lola_ft.data.encoding_judged import encode_judged
from lola_ft.data.encoding_report import Counts, EncodingReport
from lola_ft.data.example import Example
from lola_ft.data.formats import read_examples, to_example
from lola_ft.data.hub_rows import commit_of
from lola_ft.data.mixing import Mixed, MixSettings, mix
from lola_ft.data.prompt_template import Template
from lola_ft.data.rows import Findings, Row, Source
from lola_ft.data.source_rows import files_of, read_rows
from lola_ft.data.turns import encode_texts

__all__ = [
    "CHAT",
    "BadRows",
    "ChatTemplate",
    "Counts",
    "Encoded",
    "EncodingReport",
    "Example",
    "Findings",
    "LeakCheck",
    "MixSettings",
    "Mixed",
    "PromptTemplate",
    "Row",
    "Source",
    "Template",
    "chat_source",
    "check_template",
    "commit_of",
    "encode",
    "encode_judged",
    "encode_texts",
    "files_of",
    "hold_out",
    "is_validation",
    "load_template",
    "mix",
    "read_examples",
    "read_rows",
    "to_example",
    "without_duplicates",
]
