"""Reading rows: what is accepted, and the message for every file that is not."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lola_ft.data import BadRows, Source, read_examples, read_rows
from lola_ft.data.source_rows import _READERS, KINDS, files_of
from lola_ft.errors import DataError
from lola_ft.recipe import schema
from lola_ft.row_formats import ROWS_OF_THEIR_OWN


def rows_of(folder: Path, name: str, content: bytes) -> list[dict[str, object]]:
    path = folder / name
    path.write_bytes(content)
    return [row.fields for row in read_rows(Source("text", str(path)))]


def failure(folder: Path, name: str, content: bytes, format: str = "text") -> str:
    """The message for a file, its folder left out."""
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_examples([Source(format, str(path))]))
    return str(caught.value).replace(f"{folder}/", "")


GOOD = [
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n'),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"}'),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \r\n{"text": "b"}\r\n'),
    ("A.JSONL", b'\n\n{"text": "a"}\n{"text": "b"}\n'),
    ("a.json", b'[{"text": "a"}, {"text": "b"}]'),
    ("a.json", b'\xef\xbb\xbf[\r\n{"text": "a"},\r\n{"text": "b"}\r\n]\r\n'),
]


@pytest.mark.parametrize(("name", "content"), GOOD)
def test_files_as_editors_write_them_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    assert rows_of(tmp_path, name, content) == [{"text": "a"}, {"text": "b"}]


def test_a_row_knows_its_place(tmp_path: Path) -> None:
    lines, items = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    items.write_text('[{"text": "a"}, {"text": "b"}]')
    assert [row.where for row in read_rows(Source("text", str(lines)))] == [f"{lines}:2", f"{lines}:4"]
    assert [row.where for row in read_rows(Source("text", str(items)))] == [f"{items}:[0]", f"{items}:[1]"]


@pytest.mark.parametrize("text", ["\u2028 \u2029 \x85 \x0b", "שלום", "नमस्ते", "🙂", "e\u0301", "\ufeff"])
def test_text_comes_through_untouched(tmp_path: Path, text: str) -> None:
    content = json.dumps({"text": text}, ensure_ascii=False).encode()
    assert rows_of(tmp_path, "a.jsonl", content) == [{"text": text}]


BAD_FILES = [
    ("a.jsonl", b"", "a.jsonl holds no rows. Give a file with at least one row, or remove this source."),
    ("a.jsonl", b"\n \r\n", "a.jsonl holds no rows. Give a file with at least one row, or remove this source."),
    ("a.json", b"", "a.json holds no rows. Give a file with at least one row, or remove this source."),
    ("a.json", b"[]", "a.json holds no rows. Give a file with at least one row, or remove this source."),
    ("a.pdf", b"text", f"a.pdf: unknown kind of file '.pdf'. Supported are {KINDS}."),
    (
        "rows",
        b"{}",
        f"rows: unknown kind of file ''. Supported are {KINDS}. If it is text, name it .txt; if it has one JSON object "
        "per line, name it .jsonl.",
    ),
    ("a.xlsx", b"PK", f"a.xlsx: unknown kind of file '.xlsx'. Supported are {KINDS}. Save the sheet as .csv."),
    ("a.jsonl", b"PAR1...", "a.jsonl: is a Parquet file by its content. Name it .parquet."),
    ("a.csv", b"PK\x03\x04", "a.csv: is a zip archive or a spreadsheet. Unpack it, or save the sheet as .csv."),
    ("a.json", b"<!DOCTYPE html><html>", "a.json: is a web page, not data. Download the file itself."),
    (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "a.parquet: is a pointer of Git LFS, not the file itself. Fetch the file with `git lfs pull`.",
    ),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "a.jsonl:2: broken JSON at column 13: expecting ',' delimiter."),
    ("a.jsonl", b"hello\n", "a.jsonl:1: broken JSON at column 1: expecting value."),
    (
        "a.jsonl",
        b'{"text": "a"} {"text": "b"}\n',
        "a.jsonl:1: broken JSON at column 15: extra data. Give each object a line of its own.",
    ),
    ("a.jsonl", b'{"text": NaN}\n', "a.jsonl:1: broken JSON: NaN is not JSON; write null, or leave the field out."),
    (
        "a.jsonl",
        b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n',
        "a.jsonl:2: begins with a byte order mark, which is allowed only at the beginning of a file. Remove it.",
    ),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: nested too deeply."),
    ("a.jsonl", b'[{"text": "a"}]\n{}', 'a.jsonl:1: expected an object such as {"instruction": …}; found a list.'),
    ("a.jsonl", b"\n3\n", 'a.jsonl:2: expected an object such as {"instruction": …}; found a number.'),
    ("a.jsonl", b"null\n", 'a.jsonl:1: expected an object such as {"instruction": …}; found null.'),
    (
        "a.jsonl",
        b"{'text': 'a'}\n",
        "a.jsonl:1: broken JSON at column 2: expecting property name enclosed in double quotes. It looks like Python's "
        "notation: write rows with json.dumps.",
    ),
    (
        "a.json",
        b'{\n"text": "a"\n},\n{\n"text": "b"\n}\n',
        "a.json: objects with commas between them. Put them all in [ and ] to make one list.",
    ),
    (
        "a.json",
        b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
        "a.json: one object with several lists of rows (train, test). Choose one: `rows_under: train`.",
    ),
    (
        "a.json",
        b'{"text": {"0": "a", "1": "b"}, "lang": {"0": "sw", "1": "de"}}',
        "a.json: one object with the columns of a table, as pandas' to_json writes. Write one object per row; in "
        "pandas: df.to_json(path, orient='records', lines=True, force_ascii=False).",
    ),
    (
        "a.json",
        b'{"a": {"text": "a"}, "b": {"text": "b"}}',
        "a.json: one object with a row under each key. Write one object per row; in pandas: "
        "df.to_json(path, orient='records', lines=True, force_ascii=False).",
    ),
    ("a.json", b'"a"', "a.json: expected objects or a list of objects; found text."),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xe9"}\n',
        "a.jsonl:2: not UTF-8 text (byte 11 is 0xe9). Save the file as UTF-8.",
    ),
    (
        "a.jsonl",
        '{"text": "a"}\n'.encode("utf-16") + b"\0",
        "a.jsonl: begins like UTF-16 but is not ('utf-16-le' codec can't decode byte 0x00 in position 0: truncated "
        "data). Save it as UTF-8.",
    ),
    ("a.json", b'[{"text": "a"},\n{"text": }]', "a.json:2: broken JSON at column 10: expecting value."),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "a", "lang": "sw", "text": "b"}\n',
        "a.jsonl:2: key 'text' comes more than once in an object. Keep one of them.",
    ),
    (
        "a.jsonl",
        b'{"text": "a", "of": [{"x": 1}, {"x": {"y": 2, "z": 3, "y": 2}}]}\n',
        "a.jsonl:1: key 'y' comes more than once in an object. Keep one of them.",
    ),
    (
        "a.jsonl",
        b'{"text": {"y": 1, "y": 2}, "text": "a"}\n',
        "a.jsonl:1: key 'text' comes more than once in an object. Keep one of them.",
    ),
    (
        "a.json",
        b'[{"text": "a"}, {"text": "b", "of": [{"x": 1, "x": 1}]}]',
        "a.json:[1]: key 'x' comes more than once in an object. Keep one of them.",
    ),
    (
        "a.json",
        b'[{"text": "a"}, 3]',
        'a.json:[1]: expected an object such as {"instruction": …}; found a number.',
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert failure(tmp_path, name, content) == message


@pytest.mark.parametrize(("name", "rows"), [("a.jsonl", "{}\n{}\n{}\n"), ("a.json", "[{}, {}, {}]")])
def test_a_row_with_a_repeated_key_spoils_no_other(tmp_path: Path, name: str, rows: str) -> None:
    path, skipped = tmp_path / name, BadRows()
    path.write_text(rows.replace("{}", "%s") % ('{"text": "a"}', '{"text": "b", "text": "b"}', '{"text": "c"}'))
    found = list(read_examples([Source("text", str(path))], skipped))
    assert [row.completion for row in found] == ["a", "c"]
    assert skipped.counts == {str(path): 1}


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "swahili.jsonl").touch()
    with pytest.raises(DataError) as caught:
        read_rows(Source("text", str(tmp_path / "swahil.jsonl")))
    near = tmp_path / "swahili.jsonl"
    assert str(caught.value) == f"{tmp_path / 'swahil.jsonl'}: no such file. Did you mean '{near}'?"
    with pytest.raises(DataError) as caught:
        read_rows(Source("text", str(tmp_path / "data" / "x.jsonl")))
    assert str(caught.value).endswith(f"no such file. The folder '{tmp_path / 'data'}' does not exist either.")


@pytest.mark.parametrize(
    ("name", "reason"), [("a" * 300 + ".jsonl", "File name too long"), ("a.jsonl/b.jsonl", "Not a directory")]
)
def test_a_file_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError) as caught:
        read_rows(Source("text", str(tmp_path / name)))
    assert str(caught.value) == f"{tmp_path / name}: cannot be read: {reason}."


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=60) | st.text('{}[]":,ab0 \n\r\\u', max_size=40).map(str.encode),
    first=st.sampled_from([b"", b'{"text": "a"}\n', b"text\na\n", b"text\tb\na\tb\n"]),
)
@example(b'{"a": ' + b"1" * 5000 + b"}", b"")
@example(b'{"text": "\\ud800"}', b"")
@example(b'{"\\ud800": 3}', b'{"text": "a"}\n')
@example(b'"a"b\n', b"text\n")
@example(b'{"\\ud800": 3, "\\ud800": 4}', b'{"text": "a"}\n')
@example(b'[{"a": 3, "a": 4}]', b"")
@pytest.mark.parametrize("name", ["fuzz.jsonl", "fuzz.json", "fuzz.csv", "fuzz.tsv", "fuzz.txt", "fuzz.parquet"])
def test_any_bytes_are_rows_or_give_one_clean_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, first: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(first + content)
    skipped = BadRows()
    for bad_rows in (None, skipped):
        try:
            rows = list(read_examples([Source("text", str(path))], bad_rows))
        except DataError as error:
            message = str(error)
            assert message.isprintable()
        else:
            message = rows[0].where
        assert str(path) in message
    json.dumps(skipped.as_dict(), ensure_ascii=False).encode()


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")).write_text('{"text": "a"}')
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DataError, match=r"caf\\udce9.jsonl: the name of the file or its folder is not UTF-8"):
        files_of(str(tmp_path))


def test_a_hub_dataset_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for the Hub: `datasets` reads both by the same call."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "lang": "sw"}\n')
    (folder / "test.jsonl").write_text('{"text": "b", "lang": "de"}\n')
    [train] = read_examples([Source("text", hub=str(folder), language_column="lang")])
    [test] = read_rows(Source("text", hub=str(folder), split="test"))
    assert (train.completion, train.language, train.where) == ("a", "sw", f"{folder}[train]:[0]")
    assert test.fields["text"] == "b"
    with pytest.raises(DataError, match="cannot be loaded from the Hub: Unknown split"):
        read_rows(Source("text", hub=str(folder), split="dev"))


def test_a_dataset_that_is_not_on_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^nobody/nothing\[train\]: cannot be loaded from the Hub: "):
        read_rows(Source("text", hub="nobody/nothing"))


def test_a_recipes_source_has_the_same_keys() -> None:
    written = schema.Source.model_validate({"path": "a.jsonl", "format": "text", "fields": {"text": "body"}})
    assert Source(**written.model_dump()) == Source("text", "a.jsonl", fields={"text": "body"})


def test_every_kind_of_file_but_text_has_rows_of_its_own() -> None:
    assert {*ROWS_OF_THEIR_OWN, ".txt"} == set(_READERS)
