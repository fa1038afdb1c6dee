"""Data as it lies around: read for what it is where that is certain, and what was decided is said."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from lola_ft.data import Findings, Source, read_examples, read_rows
from lola_ft.data.conversations import read_conversation
from lola_ft.data.source_rows import files_of, scan_rows
from lola_ft.errors import DataError
from tests.conftest import assert_says

ROWS = [{"instruction": f"Say {word}", "output": word} for word in ("moja", "mbili; na", "tatu, nne")]


def read(path: Path, format: str = "alpaca", **keys: Any) -> tuple[list[str], list[str]]:
    """The answers of a source, and what was found, the folder left out."""
    findings: dict[str, Findings] = {}
    answers = [row.completion for row in read_examples([Source(format, str(path), **keys)], findings=findings)]
    lines = [line for name, found in findings.items() for line in found.lines(name)]
    return answers, [line.replace(f"{path.parent}/", "") for line in lines]


def failure(path: Path, format: str = "alpaca", **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_examples([Source(format, str(path), **keys)]))
    return str(caught.value).replace(f"{path.parent}/", "")


def table(delimiter: str, rows: list[dict[str, str]] = ROWS) -> str:
    """A table without quotes."""
    return "".join(delimiter.join(row) + "\n" for row in [list(rows[0]), *(row.values() for row in rows)])


PLAIN = [{"instruction": f"Say {word}", "output": word} for word in ("moja", "mbili", "tatu")]
ANSWERS = ["moja", "mbili", "tatu"]


@pytest.mark.parametrize(
    ("name", "delimiter", "note"),
    [
        ("a.csv", ",", []),
        ("a.csv", ";", ["a.csv: read with semicolons between cells."]),
        ("a.csv", "\t", ["a.csv: read with tabs between cells."]),
        ("a.csv", "|", ["a.csv: read with bars between cells."]),
        ("a.tsv", "\t", []),
        ("a.tsv", ",", ["a.tsv: read with commas between cells."]),
    ],
)
def test_the_delimiter_is_found_and_said(tmp_path: Path, name: str, delimiter: str, note: list[str]) -> None:
    (tmp_path / name).write_text(table(delimiter, PLAIN))
    assert read(tmp_path / name) == (ANSWERS, note)


def test_cells_may_hold_the_other_delimiters(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction;output\nSay one, two, three;1, 2, 3\nSay four, or five;4, 5\n")
    assert read(tmp_path / "a.csv")[0] == ["1, 2, 3", "4, 5"]
    (tmp_path / "a.csv").write_text('instruction,output\n"one; two",1; 2\nthree; four,3; 4\n')
    assert read(tmp_path / "a.csv") == (["1; 2", "3; 4"], [])


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=;\n"])
def test_excels_first_line_names_the_delimiter(tmp_path: Path, first: str) -> None:
    (tmp_path / "a.csv").write_text(first + table(";", PLAIN), newline="")
    assert read(tmp_path / "a.csv")[0] == ANSWERS
    [row, *_] = read_rows(Source("alpaca", str(tmp_path / "a.csv")))
    assert row.where == f"{tmp_path / 'a.csv'}:3"


def test_a_delimiter_given_by_key_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction;output~x\na;b~1\n")
    assert read(tmp_path / "a.csv", delimiter="~", fields={"instruction": "instruction;output", "output": "x"}) == (
        ["1"],
        [],
    )


def test_a_quotation_mark_in_a_tsv_swallows_nothing_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('source\ttarget\neins\tone\n"Nun, er\tWell, he\nund das\tand that\ndas Ende"\tthe end\n')
    keys = {"source_language": "de", "target_language": "en"}
    answers, lines = read(path, "translation", **keys)
    assert answers == ["one", "Well, he", "and that", "the end"]
    assert_says(lines[0], "a.tsv:3: this row has a cell that begins with a quotation mark … set `quoting: true`")
    answers, lines = read(path, "translation", quoting=True, **keys)
    assert answers == ["one", "the end"]
    assert_says(lines[0], "a.tsv:3: … swallowed lines … set `quoting: false`")


def test_a_cell_over_several_lines_is_reported_with_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\na,1\n"two\nlines","b\nc"\nd,e\n"f\ng",h\n')
    assert read(path) == (
        ["1", "b\nc", "e", "h"],
        ["a.csv:3: this row and 1 more have a cell that spans several lines."],
    )
    path.write_text('instruction,output\n"a,1\nb,2\nc",3\n')
    assert_says(read(path)[1][0], "a.csv:2: this row has … looks like several rows … set `quoting: false`")


def test_pandas_index_and_excels_empty_columns_are_no_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",instruction,output\n0,a,1\n1,b,2\n")
    assert read(path) == (["1", "2"], ["a.csv: fields not used: column 1 (2 of 2 rows)."])
    path.write_text("instruction,output,,\na,1,,\nb,2,,\nc,3\n")
    assert read(path) == (["1", "2", "3"], [])
    path.write_text("instruction,output\na,1,,\nb,2\n")
    assert read(path) == (["1", "2"], [])


SHAPES: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "objects over several lines": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "a list in one line": lambda rows: json.dumps(rows),
    "a list over several lines": lambda rows: json.dumps(rows, indent=4),
    "a list with an object a line": lambda rows: "[" + ",\n".join(json.dumps(row) for row in rows) + "]\n",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.json.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_as_json_in_any_shape_and_kind_of_file(tmp_path: Path, name: str, shape: str) -> None:
    write_packed(tmp_path / name, SHAPES[shape](ROWS).encode())
    assert read(tmp_path / name) == ([row["output"] for row in ROWS], [])


def write_packed(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[:20]) + gzip.compress(content[20:]))  # two members, as `cat` makes them
    elif path.suffix == ".zst":
        path.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.zst"])
def test_tables_are_unpacked(tmp_path: Path, name: str) -> None:
    write_packed(tmp_path / name, table("\t" if "tsv" in name else ",", PLAIN).encode())
    assert read(tmp_path / name) == (ANSWERS, [])


def test_what_is_packed_is_told_from_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(SHAPES["lines"](ROWS).encode()))
    assert len(read(tmp_path / "a.jsonl")[0]) == 3
    (tmp_path / "a.jsonl.gz").write_text(SHAPES["lines"](ROWS))  # as some programs leave it after a download
    assert len(read(tmp_path / "a.jsonl.gz")[0]) == 3


def test_line_ends_of_old_programs_are_read_and_empty_rows_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"instruction,output\ra,1\r,\rb,2\r")
    assert read(tmp_path / "a.csv") == (["1", "2"], [])


def test_a_quoted_header_in_a_tsv_asks_for_quoting(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('"instruction"\t"output"\n"a"\t"b"\n')
    assert_says(failure(tmp_path / "a.tsv"), "a.tsv:1: … names are in quotation marks. Set `quoting: true`")
    assert read(tmp_path / "a.tsv", quoting=True) == (["b"], [])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
def test_a_packed_file_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    write_packed(tmp_path / name, b'{"text": "a"}\n' * 1000)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-10])
    assert_says(failure(tmp_path / name, "text"), f"{name}: cannot be read: ")


@pytest.mark.parametrize("key", ["data", "rows", "train"])
def test_a_list_under_one_key_is_read_and_said(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "tags": ["a"], key: ROWS, "about": [{"author": "x"}]}))
    answers, lines = read(path)
    assert answers == [row["output"] for row in ROWS]
    assert lines == [f"a.json: the rows are in the list under '{key}'."]
    [first, *_] = read_rows(Source("alpaca", str(path)))
    assert first.where == f"{path}:{key}[0]"


def test_a_list_two_keys_deep_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"about": "x", "data": {"train": ROWS}}))
    assert read(tmp_path / "a.json")[1] == ["a.json: the rows are in the list under 'data.train'."]
    (tmp_path / "a.json").write_text(json.dumps({"data": {"train": ROWS, "test": ROWS}}))
    assert_says(failure(tmp_path / "a.json"), "(data.train, data.test) … `rows_under: data.train`")
    assert len(read(tmp_path / "a.json", rows_under="data.test")[0]) == 3


def test_of_several_lists_the_key_chooses(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert len(read(tmp_path / "a.json", rows_under="train")[0]) == 3
    assert len(read(tmp_path / "a.json", rows_under="test")[0]) == 1
    (tmp_path / "a.json").rename(tmp_path / "a.jsonl")
    assert len(read(tmp_path / "a.jsonl", rows_under="test")[0]) == 1
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert_says(failure(tmp_path / "a.json", rows_under="dev"), "a.json: has no list under 'dev' (found: train, test)")


def test_a_single_conversation_is_a_row_and_no_list_of_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.json").write_text(json.dumps({"id": 1, "messages": turns}, indent=1))
    assert read(tmp_path / "a.json", "messages")[0] == ["hello"]
    (tmp_path / "a.json").write_text(json.dumps({"id": 1, "turns": turns}))
    assert_says(failure(tmp_path / "a.json", "messages"), "a.json:1: field 'messages' is missing … {messages: turns}")


def test_a_pretty_printed_row_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(json.dumps(row, indent=1) for row in ROWS))
    places = [row.where.rpartition(":")[2] for row in read_rows(Source("alpaca", str(tmp_path / "a.jsonl")))]
    assert places == ["2", "7", "12"]
    (tmp_path / "a.jsonl").write_text('{\n"instruction": "a",\n"output": "b"\n}\n{\n"instruction": oops\n}\n')
    assert_says(failure(tmp_path / "a.jsonl"), "a.jsonl:6: broken JSON at column 16")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_the_encoding_of_a_file_is_found(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"instruction": "Sema", "output": word} for word in ("ndiyo", "शब्द", "🙂 ok")]
    texts = {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows),
        ".json": json.dumps(rows, ensure_ascii=False),
        ".csv": table(",", rows),
        ".tsv": table("\t", rows),
    }
    (tmp_path / name).write_bytes(texts[Path(name).suffix].encode(encoding))
    assert read(tmp_path / name) == (["ndiyo", "शब्द", "🙂 ok"], [])


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == ([row["output"] for row in ROWS], [])
    DatasetDict(train=dataset).save_to_disk(tmp_path / "only")
    assert len(read(tmp_path / "only")[0]) == 3
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    assert_says(failure(tmp_path / "two"), "two: a folder of `datasets` with several splits (test, train) … two/test")
    assert len(read(tmp_path / "two" / "train")[0]) == 3
    (tmp_path / "one" / "state.json").write_text("{}")
    assert_says(failure(tmp_path / "one"), "state.json: damaged")


def test_files_about_the_data_are_not_read_and_are_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("README.txt", "LICENSE.txt", "dataset_info.json", "readme.en.txt"):
        (data / name).write_text("about")
    (data / "state of the art.txt").write_text("a text")
    (data / "a.txt").write_text("rows")
    assert files_of(str(data)) == [data / "a.txt", data / "state of the art.txt"]
    findings = Findings()
    list(scan_rows(Source("text", str(data)), findings))
    assert len(findings.notes) == 4
    assert_says(findings.notes[0], "LICENSE.txt: not read")
    assert files_of(str(data / "README.txt")) == [data / "README.txt"]  # named by itself


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "yahma/alpaca-cleaned",
            "If it is a dataset on the Hub, write `hub: yahma/alpaca-cleaned` in place of `path`.",
        ),
        ("https://huggingface.co/datasets/a/b/tree/main", "write `hub: a/b`"),
        ("hf://datasets/a/b@main/x.parquet", "`hub: a/b`"),
        ("https://example.org/a.jsonl", "a web address, not a path. Download the file"),
        ("data/a.jsonl", "no such file in"),
    ],
)
def test_an_id_or_address_in_path_is_pointed_at_the_hub(path: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_examples([Source("alpaca", path)]))
    assert message.lower() in str(caught.value).lower()


@pytest.mark.parametrize("hub", ["FILE", "https://huggingface.co/datasets/a/b"])
def test_a_file_or_address_in_hub_is_pointed_back(hub: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    hub = hub.replace("FILE", str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError) as caught:
        list(read_examples([Source("alpaca", hub=hub)]))
    assert_says(str(caught.value), f"{hub}: … Write … {'path' if 'jsonl' in hub else 'hub: owner/name'}")


def test_a_missing_file_names_the_folder_it_was_looked_for_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(DataError) as caught:
        list(read_examples([Source("alpaca", "data/a.jsonl")]))
    assert_says(
        str(caught.value), f"data/a.jsonl: no such file in {tmp_path / 'deep'} … It exists relative to {tmp_path}"
    )


def test_fields_that_nothing_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        row | {"sources": [["a", "b"]] * (i > 0), "mood": "Be kind." * (i == 2), "input": ""}
        for i, row in enumerate(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path)[1] == ["a.jsonl: fields not used: sources (2 of 3 rows), mood (1 of 3 rows)."]
    assert read(path, language_column="instruction")[1] == read(path)[1]
    assert "output" in read(path, fields={"output": "instruction"})[1][0]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", "reasoning_content": "hm"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert read(path, "messages")[1] == ["a.jsonl: fields not used: messages[].reasoning_content (1 of 1 rows)."]


@pytest.mark.parametrize("label", ["0.0", 0.0, "0", 0, "0.00"])
def test_a_whole_float_is_a_whole_number_as_a_label(tmp_path: Path, label: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "label": label}))
    assert read(path, "classification", labels={"0": "bad", "1": "good"})[0] == ["bad"]


def test_decimals_and_empty_cells_are_read_as_labels_of_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,0.0\nb,1.0\nc,\n")
    message = failure(path, "classification", labels={"0": "bad", "1": "good"})
    assert_says(message, "a.csv:4: field 'label' is empty")
    path.write_text("prompt,completion,label\na,b,1.0\n")
    [row] = read_examples([Source("unpaired_preference", str(path))])
    assert row.desirable is True


def test_advice_is_given_in_the_words_of_the_verb(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "a", "answer": "b"}))
    assert_says(failure(path), "Map it with `fields: {output: answer}`.")
    assert_says(failure(path, by_options=True), "Map it with `--field output=answer`.")
    path.write_text(json.dumps({"text": "a", "label": 1}))
    assert_says(failure(path, "classification"), "`labels: {1: …}`")
    assert_says(failure(path, "classification", by_options=True), "`--label 1=…`")
    (tmp_path / "a.tsv").write_text("text\ta\nb\n")
    assert_says(failure(tmp_path / "a.tsv", "text", by_options=True), "`--quoting`")


@pytest.mark.parametrize(("value", "word"), [(None, "null"), (3, "a number"), (2.5, "a number"), (["a"], "a list")])
def test_messages_speak_of_kinds_of_values_as_json_does(tmp_path: Path, value: Any, word: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": value}))
    assert failure(path, "text") == f"a.jsonl:1: field 'text' must be text; found {word}."


SAID = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]


def test_messages_in_a_cell_of_a_table_are_json_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    cell = json.dumps(SAID).replace('"', '""')
    path.write_text(f'messages,n\n"{cell}",1\n')
    assert read(path, "messages")[0] == ["1"]
    path.write_text(f'messages,n\n"{SAID}",1\n')  # as pandas writes a column of lists
    assert_says(failure(path, "messages"), "a.csv:2: field 'messages' … found text … json.dumps")


def test_a_judged_answer_may_be_one_message(tmp_path: Path) -> None:
    """Rows of LLaMA-Factory hold a conversation and two messages that could come next."""
    path = tmp_path / "a.jsonl"
    row = {
        "conversations": [{"from": "human", "value": "one"}],
        "chosen": {"from": "gpt", "value": "1"},
        "rejected": {"from": "gpt", "value": "2"},
    }
    path.write_text(json.dumps(row) + "\n")
    assert read(path, "preference", fields={"prompt": "conversations"})[0] == ["1"]


def test_a_call_under_its_earlier_name_is_a_tool_call(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    call = {"role": "assistant", "content": None, "function_call": {"name": "count", "arguments": '{"to": 1}'}}
    result = {"role": "function", "name": "count", "content": "1"}
    path.write_text(json.dumps({"messages": [SAID[0], call, result, SAID[1]]}) + "\n")
    [row] = read_rows(Source("messages", str(path)))
    exchanges = read_conversation(row, Source("messages", str(path)))
    function = exchanges[0][0]["reply"]["tool_calls"][0]["function"]
    assert function == {"name": "count", "arguments": {"to": 1}}
    assert read(path, "messages")[1] == []  # nothing is called unused


def test_a_field_inside_another_is_pointed_at(tmp_path: Path) -> None:
    """The Hub's viewer gives rows in this form."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"rows": [{"row_idx": 0, "row": {"instruction": "one", "output": "1"}}]}))
    assert_says(failure(path), "field 'instruction' is missing … `fields: {instruction: row.instruction}`")
    assert read(path, fields={"instruction": "row.instruction", "output": "row.output"})[0] == ["1"]
