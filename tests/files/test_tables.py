"""Tables are written so that they read back."""

from __future__ import annotations

import csv
import json
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support import iter_column

from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.files.tables import row_writer, write_rows
from onnxsim_embed.files.texts import iter_texts

TEXTS = [
    "a road",
    'the "old", sea',
    "two\nlines",
    "",
    "lone\rreturn",
    "tab\there",
    '"all"',
    "a;b|c",
]
PLAIN = ["a road", '"quoted" start', "", "a,b", "nul\0"]


def test_the_csv_module_reads_what_is_written(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows({"row": np.arange(len(TEXTS)), "text": TEXTS}, path)
    with path.open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["row", "text"],
            *([str(i), t] for i, t in enumerate(TEXTS)),
        ]
    plain = ['5" pipe', "", "a,b"]
    write_rows({"text": plain}, tmp_path / "rows.tsv")
    assert (tmp_path / "rows.tsv").read_text() == "text\n" + "".join(f"{text}\n" for text in plain)


def test_columns_of_unequal_length_are_rejected_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_rows({"a": [1, 2], "b": [1]}, tmp_path / "rows.csv")
    assert list(tmp_path.iterdir()) == []


def write(path, rows):
    """Write rows, a list of dicts, in the format of the ending."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row['text']}\n" for row in rows))
    else:
        write_rows({name: [row[name] for row in rows] for name in rows[0]}, path)
    return path


@pytest.mark.parametrize("target", ["csv", "tsv", "jsonl", "parquet", "txt"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "txt"])
def test_selected_rows_read_back(tmp_path, kind, target):
    one_column = "txt" in (kind, target)
    texts = PLAIN[:4] if one_column else TEXTS
    rows = [
        {"text": text} if one_column else {"id": str(i), "text": text}
        for i, text in enumerate(texts)
    ]
    source = write(tmp_path / f"in.{kind}", rows)
    path = tmp_path / f"out.{target}"
    row_writer(str(source), None, target, len(rows))(path, np.array([0, 2, 3]))
    assert list(iter_texts(path)) == [texts[row] for row in (0, 2, 3)]
    if not one_column:
        assert list(iter_column(path, "id")) == ["0", "2", "3"]


def test_skipped_rows_are_not_counted(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": "c"}\n')
    parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), tmp_path / "in.parquet")
    for source in (path, tmp_path / "in.parquet"):
        for target in ("csv", "parquet"):
            write_selected = row_writer(str(source), None, target, 2, skipped=[1])
            write_selected(tmp_path / f"out.{target}", np.array([1]))
            assert list(iter_texts(tmp_path / f"out.{target}")) == ["c"]
        with pytest.raises(OnnxsimEmbedError, match="changed"):
            row_writer(str(source), None, "csv", 2)


@pytest.mark.parametrize(
    ("columns", "targets"),
    [({"x": [b"\xff"]}, ("csv", "tsv", "jsonl")), ({"x": [[{"k": b"a"}]]}, ("csv", "jsonl")),
     ({"x": [1]}, ("txt",)), ({"text": ["a\nb"]}, ("txt",)),
     ({"x": pyarrow.array(["a"], pyarrow.string_view())}, ("parquet",))],
)  # fmt: skip
def test_what_a_format_cannot_hold_fails_before_the_work(tmp_path, columns, targets):
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]} | columns), path)
    for target in targets:
        with pytest.raises(ValueError, match=r"write \."):
            row_writer(path, None, target, 1)


def test_values_of_parquet_columns_are_written_as_text(tmp_path):
    columns = {"text": ["a"], "list": [[1, None]], "struct": [{"a": "é"}], "decimal": [Decimal("1.50")],
               "date": [date(2020, 1, 2)], "flag": [True], "none": [None]}  # fmt: skip
    path = str(tmp_path / "in.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    for target, expected in (
        ("csv", 'text,list,struct,decimal,date,flag,none\na,"[1, null]","{""a"": ""é""}",1.50,2020-01-02,true,\n'),
        ("jsonl", '{"text": "a", "list": [1, null], "struct": {"a": "é"}, "decimal": "1.50", '
                  '"date": "2020-01-02", "flag": true, "none": null}\n'),
    ):  # fmt: skip
        row_writer(path, None, target, 1)(tmp_path / "out", np.array([0]))
        assert (tmp_path / "out").read_text(encoding="utf-8") == expected


def test_types_survive_from_parquet_to_parquet(tmp_path):
    table = pyarrow.table({
        "text": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        "when": pyarrow.array([1, 2, 3], pyarrow.timestamp("ns")),
        "price": pyarrow.array([1, 2, 3], pyarrow.decimal128(9, 2)),
        "list": pyarrow.array([[1], None, []], pyarrow.list_(pyarrow.int8()))
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "in.parquet")
    row_writer(str(tmp_path / "in.parquet"), None, "parquet", 3)(
        tmp_path / "out.parquet", np.array([0, 2])
    )
    assert parquet.read_table(tmp_path / "out.parquet").equals(table.take([0, 2]))


@pytest.mark.parametrize("target", ["parquet", "csv"])
@pytest.mark.parametrize("value", ['"one"', '"\\ud83d"'])
def test_a_column_of_several_types_or_halves_of_characters_is_jsonl_only(tmp_path, value, target):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"text": "a", "x": 1}}\n{{"text": "b", "x": {value}}}\n')
    if (value, target) == ('"one"', "csv"):
        row_writer(str(path), None, target, 2)
    else:
        with pytest.raises(ValueError, match=r"write \.jsonl"):
            row_writer(str(path), None, target, 2)
    write_selected = row_writer(str(path), None, "jsonl", 2)
    write_selected(tmp_path / "out.jsonl", np.arange(2))
    assert (tmp_path / "out.jsonl").read_text() == path.read_text()
