"""Generated files against a reference reader: the same texts, or an error that names the row.

FUZZ_FILES=20000 pytest tests/files/test_reader_fuzz.py is the full run; by default it is a sample.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re

import numpy as np
import pytest
from support import iter_column

from onnxsim_embed.errors import NoTextsError, TableError
from onnxsim_embed.files.tables import row_writer, write_rows
from onnxsim_embed.files.texts import SURROGATES, iter_texts

FILES = int(os.environ.get("FUZZ_FILES", "1200"))
PIECES = ["a", "road", "é", "🙂", " ", "", "x,y", ";", "|", '"', '""', "'", "\\", "\n", "\r", "\r\n",
          "\t", "\0", "\u2028", "{", "null", "sep=", "1", '"q"']  # fmt: skip
NAMED = re.compile(r"row \d+|line \d+|column")


def text_of(rng, banned=""):
    text = "".join(rng.choice(PIECES, rng.integers(0, 6)))
    return "".join(character for character in text if character not in banned)


def table(rng, banned=""):
    """Return names and rows; the texts are in the last column."""
    width = int(rng.integers(1, 4))
    rows = [[text_of(rng, banned) for _ in range(width)] for _ in range(rng.integers(1, 6))]
    return [*["id", "note"][: width - 1], "text"], rows


def as_jsonl(names, rows):
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


def reference(kind, content, delimiter):
    """Return the texts, None for a row that has none; raise what the reference raises."""
    lines = content.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    if kind == "txt":
        return lines
    if kind == "jsonl":
        values = [json.loads(line) if line.strip() else "" for line in lines]
        texts = [value.get("text") if isinstance(value, dict) else value for value in values]
        return [None if SURROGATES.search(str(text)) else text for text in texts]
    header, *rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    assert all(len(row) <= len(header) for row in rows)
    column = header.index("text")
    return [
        ""
        if len(row) < max(2, len(header))
        and not "".join(row).strip()
        and (len(header) > 1 or row in ([], [""]))
        else (row + [None] * len(header))[column]
        for row in rows
    ]


def check(path, content, expected, **arguments):
    path.write_text(content, encoding="utf-8", newline="")
    texts = error = None
    try:
        texts = list(iter_texts(path, "text" if path.suffix != ".txt" else None, **arguments))
    except (TableError, ValueError) as raised:
        error = raised
    if error is None:
        assert texts == expected, content
    elif not isinstance(error, NoTextsError):
        assert NAMED.search(str(error)), (content, error)
        assert expected is None or not all(isinstance(text, str) for text in expected), content
    else:
        assert expected in (None, [], [""]), content


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_files_of_other_programs(tmp_path, kind):
    rng = np.random.default_rng(0)
    for _ in range(FILES // 8):
        path = tmp_path / f"a.{kind}"
        names, rows = table(rng, {"tsv": "\t\r\n", "txt": "\r\n"}.get(kind, ""))
        stream, delimiter = io.StringIO(newline=""), str(rng.choice(list(",;|\t")))
        delimiter = delimiter if len(names) > 1 else ","  # which nothing else would show
        if kind == "csv":
            quoting = int(rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
            writer = csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
            writer.writerows([names, *rows])
        elif kind == "tsv":
            stream.write("".join("\t".join(row) + "\n" for row in [names, *rows]))
        elif kind == "jsonl":
            stream.write(as_jsonl(names, rows))
        else:
            stream.write("".join(row[-1] + "\n" for row in rows))
        content = stream.getvalue()
        check(path, content, [row[-1] for row in rows], delimiter="\t" if kind == "tsv" else None)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_damaged_files(tmp_path, kind):
    rng = np.random.default_rng(1)
    for _ in range(FILES // 8):
        names, rows = table(rng)
        if kind == "jsonl":
            content = as_jsonl(names, rows)
        else:
            content = "\n".join(",".join(row) for row in [names, *rows])
        for _ in range(rng.integers(0, 3)):
            at = rng.integers(len(",".join(names)) + 1, len(content) + 1)
            content = content[:at] + str(rng.choice(PIECES)) + content[at + rng.integers(0, 2) :]
        try:
            expected = reference(kind, content, ",")
        except (csv.Error, ValueError, AssertionError):
            expected = None
        check(tmp_path / f"a.{kind}", content, expected, delimiter="," if kind == "csv" else None)


def test_what_is_written_reads_back(tmp_path):
    rng = np.random.default_rng(2)
    for _ in range(FILES // 8):
        names, rows = table(rng)
        names = [str(rng.choice([name, '"', f"{name};a,b"])) for name in names[:1]] + names[1:]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        source = tmp_path / "in.jsonl"
        source.write_text(as_jsonl(names, rows))
        for kind in ("csv", "tsv"):
            write_rows(columns, tmp_path / f"a.{kind}")
            for name, texts in columns.items():
                assert list(iter_column(tmp_path / f"a.{kind}", name)) == texts, (kind, columns)
            write_selected = row_writer(str(source), None, kind, len(rows))
            write_selected(tmp_path / f"b.{kind}", np.arange(len(rows)))
            assert (tmp_path / f"b.{kind}").read_bytes() == (tmp_path / f"a.{kind}").read_bytes()
