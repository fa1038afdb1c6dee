"""Tables, plain text, folders and globs: what is accepted, and the message for every file that is not."""

import csv
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lola_ft.data import BadRows, Source, read_examples, read_rows
from lola_ft.data.source_rows import KINDS, files_of
from lola_ft.errors import DataError


def rows_of(path: Path, **keys: Any) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows(Source("text", str(path), **keys))]


def failure(path: Path, **keys: Any) -> str:
    """The message for a source, its folder left out."""
    with pytest.raises(DataError) as caught:
        list(read_examples([Source("text", str(path), **keys)]))
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"text,lang\na,sw\nb,de\n"),
        ("a.csv", b'\xef\xbb\xbf"text","lang"\r\n"a","sw"\r\n\r\n"b","de"'),
        ("A.TSV", b"text\tlang\na\tsw\nb\tde\n"),
    ],
)
def test_a_text_table_is_read_by_its_header(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == [{"text": "a", "lang": "sw"}, {"text": "b", "lang": "de"}]


def test_quoted_cells_keep_separators_and_line_breaks_and_rows_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('text\n"one, ""two""\nthree"\n\nशब्द\n'.encode())
    rows = list(read_rows(Source("text", str(path))))
    assert [row.fields["text"] for row in rows] == ['one, "two"\nthree', "शब्द"]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:5"]


def test_a_broken_row_of_a_table_is_skipped_and_no_other(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.csv", BadRows()
    path.write_bytes(b'text,n\none,1\ncaf\xe9,2\n"two"x,3\n"two\nlines \xff",4\nthree,5,6\nfour,7\n')
    rows = list(read_examples([Source("text", str(path))], bad))
    assert [row.completion for row in rows] == ["one", "four"]
    assert [message.removeprefix(f"{path}:")[:12] for message in bad.messages] == [
        "3: not UTF-8",
        "4: broken ta",
        "6: not UTF-8",
        "7: 3 cells b",
    ]


def test_an_open_quote_loses_no_rows_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text\none\n"two\nthree\nfo"ur\nfive\n')
    with pytest.raises(DataError, match=r"a.csv:3: broken table"):
        list(read_examples([Source("text", str(tmp_path / "a.csv"))], BadRows()))


def test_a_cell_may_be_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'a' * 200_000}\n")
    assert len(rows_of(tmp_path / "a.csv")[0]["text"]) == 200_000


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1)))
def test_any_cell_survives_a_csv_file(tmp_path_factory: pytest.TempPathFactory, cells: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([[cell] for cell in ["text", *cells]])
    if cells:
        assert [row["text"] for row in rows_of(path)] == cells


def test_parquet_rows_are_numbered_and_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "ü"], "label": [1, None], "turns": [[{"role": "x"}], []]}), path)
    rows = list(read_rows(Source("text", str(path))))
    assert [row.fields for row in rows] == [
        {"text": "a", "label": 1, "turns": [{"role": "x"}]},
        {"text": "ü", "label": None, "turns": []},
    ]
    assert [row.where for row in rows] == [f"{path}:[0]", f"{path}:[1]"]


TEXT = b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \r\nthree\n\n\n"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (None, [("one\ntwo", 1), ("three", 5)]),
        ("paragraph", [("one\ntwo", 1), ("three", 5)]),
        ("line", [("one", 1), ("two", 2), ("three", 5)]),
        ("file", [("one\ntwo\n\n \nthree", 1)]),
    ],
)
def test_plain_text_is_divided_as_asked(tmp_path: Path, unit: str | None, expected: list[tuple[str, int]]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    found = [(row.fields["text"], row.where) for row in read_rows(Source("text", str(path), unit=unit))]
    assert found == [(text, f"{path}:{line}") for text, line in expected]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/c.txt", "notes.pdf", ".hidden.jsonl", ".git/d.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{path.stem}"}}\n' if path.suffix == ".jsonl" else path.stem)
    return tmp_path / "data"


def test_a_folder_is_its_files_of_known_kinds_by_name(folder: Path) -> None:
    assert files_of(str(folder)) == [folder / "a.jsonl", folder / "b.jsonl", folder / "deep" / "c.txt"]
    assert [row["text"] for row in rows_of(folder)] == ["a", "b", "c"]


def test_a_glob_is_the_files_that_match(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["text"] for row in rows_of(folder / "*.jsonl")] == ["a", "b"]
    assert [row["text"] for row in rows_of(folder / "**" / "[bc].*")] == ["b", "c"]
    monkeypatch.chdir(folder)
    assert files_of("*.jsonl") == [Path("a.jsonl"), Path("b.jsonl")]
    assert files_of("../data/.git/*") == [Path("../data/.git/d.jsonl")]  # hidden, and named


def test_a_file_whose_name_looks_like_a_glob_is_itself(folder: Path) -> None:
    (folder / "[a].jsonl").write_text('{"text": "brackets"}\n')
    assert [row["text"] for row in rows_of(folder / "[a].jsonl")] == ["brackets"]


def test_a_limit_stops_reading(folder: Path) -> None:
    (folder / "b.jsonl").write_text('{"text": "b"}\nbroken\n')
    assert [row["text"] for row in rows_of(folder, limit=2)] == ["a", "b"]


BAD_FILES = [
    ("a.csv", b"", "a.csv holds no rows. Give a file with at least one row, or remove this source."),
    ("a.csv", b"text\n", "a.csv holds no rows. Give a file with at least one row, or remove this source."),
    ("a.csv", b",,\na,b,c\n", "a.csv:1: no column has a name. The first line must name the columns."),
    (
        "a.csv",
        b"text;lang|a\nx;y|b\n",
        'a.csv: its cells may be divided by semicolons or bars. Set which, such as `delimiter: ";"`.',
    ),
    ("a.csv", b"text,b, text\n", "a.csv:1: two columns are named 'text'. Rename one of them."),
    (
        "a.csv",
        b"text\nHello, world\n",
        "a.csv:2: 2 cells between commas; the header has 1 (text). Put cells that hold the separator, quotes or line "
        'breaks in "quotes", '
        "and write inner quotes twice; if quotation marks are ordinary characters, set `quoting: false`.",
    ),
    (
        "a.csv",
        b"text,lang\na,sw\nb\n",
        "a.csv:3: 1 cell between commas; the header has 2. Put cells that hold the separator, quotes or line breaks in "
        '"quotes", '
        "and write inner quotes twice; if quotation marks are ordinary characters, set `quoting: false`.",
    ),
    (
        "a.csv",
        b'text\na\n"never closed\nb\n',
        "a.csv:3: broken table: unexpected end of data. Put cells that hold the separator, quotes or line breaks in "
        '"quotes", and write inner quotes twice; if quotation marks are ordinary characters, set `quoting: '
        "false`.",
    ),
    ("a.csv", b"text\na\n\xe9\n", "a.csv:3: not UTF-8 text (byte 1 is 0xe9). Save the file as UTF-8."),
    (
        "a.tsv",
        b"text\tlang\na\tb\tc\n",
        "a.tsv:2: 3 cells between tabs; the header has 2. All tabs divide cells; if cells are quoted, set "
        "`quoting: true`.",
    ),
    ("a.csv", b"text\n \n", "a.csv:2: field 'text' is empty. Fill it, or remove the row."),
    (
        "a.tsv",
        b"body\nx\n",
        "a.tsv:2: field 'text' is missing (found: body). Map it with `fields: {text: body}`.",
    ),
    ("a.txt", b"", "a.txt holds no rows. Give a file with at least one row, or remove this source."),
    ("a.txt", b"one\n\ntwo\nth\xe9\n", "a.txt:3: not UTF-8 text (byte 7 is 0xe9). Save the file as UTF-8."),
    ("a.parquet", b"", "a.parquet holds no rows. Give a file with at least one row, or remove this source."),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert failure(tmp_path / name) == message


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"text\na table of text\n")
    assert failure(path).startswith("a.parquet: cannot be read as a Parquet file: Parquet magic bytes not found")
    parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert failure(path).startswith("a.parquet: cannot be read as a Parquet file: ")
    parquet.write_table(pyarrow.table({"text": [b"bytes"]}), path)
    assert failure(path) == "a.parquet:[0]: field 'text' must be text; found bytes."


def test_a_folder_and_a_glob_without_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    kinds = KINDS.replace(" and ", " or ")
    assert failure(tmp_path / "data") == f"data: the folder holds no {kinds} file."
    assert failure(tmp_path / "*.csv") == f"*.csv: matches no file of a supported kind ({KINDS})."


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=60) | st.text('",\t\r\nab\0é', max_size=40).map(str.encode))
@pytest.mark.parametrize("name", ["fuzz.csv", "fuzz.tsv", "fuzz.txt", "fuzz.parquet"])
def test_any_bytes_are_rows_or_give_one_clean_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = list(read_examples([Source("text", str(path))]))
    except DataError as error:
        message = str(error)
    else:
        message = rows[0].where
    assert str(path) in message
    assert "\n" not in message


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_parquet_file_gives_rows_or_one_clean_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    try:
        rows = list(read_examples([Source("text", str(path))]))
    except DataError as error:
        message = str(error)
    else:
        message = rows[0].where
    assert str(path) in message
