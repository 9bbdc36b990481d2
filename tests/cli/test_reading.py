"""How commands read files of texts: column, delimiter, header, and rows without a text."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from support import read_rows

from onnxsim_embed.files.vectors import read_ids

BAD = '{"text": "a road"}\n{"text": null}\n{"text": "the sun"}\n{"text": "a road"}\n'
COMMANDS = {
    "encode": ("-o", "v.npy"),
    "similarity": ("--pairs", "p.csv"),
    "search": ("a road", "--in"),
    "dedupe": ("-o", "d.csv", "--groups", "g.csv"),
    "cluster": ("-o", "c.csv", "--min-size", "1"),
    "heatmap": ("-o", "h.png"),
}


@pytest.fixture
def command(run, artifact, tmp_path, monkeypatch):
    """Run a command on a file of the current directory."""
    monkeypatch.chdir(tmp_path)

    def call(name, file, *options):
        arguments = (*COMMANDS[name], file) if name == "search" else (file, *COMMANDS[name])
        return run(name, *arguments, "-m", artifact, *options)

    return call


CONSOLE = """
import os, shlex, sys
from onnxsim_embed.cli import main
for line in open("commands", encoding="utf-8"):
    sys.argv = ["onnxsim-embed", *(os.fsdecode(a.encode()) for a in shlex.split(line))]
    try:
        main()
    except SystemExit as ended:
        print("\\n=", ended.code or 0)
"""


@pytest.mark.parametrize(
    "console",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["cp1252", "C"],
)
def test_texts_outside_the_code_page_of_the_console_are_printed(tmp_path, artifact, console):
    name = "данные.csv" if "PYTHONIOENCODING" in console else "data.csv"
    (tmp_path / name).write_text(
        "id;text\nа;naïve 漢字 🙂\nб;road ☃\nв;☂\nв;☂ ☃ road\n", encoding="utf-8"
    )
    (tmp_path / "pairs.csv").write_text("漢字,☂,1\nа,б,2\nsun,sky,3\n", encoding="utf-8")
    model = f"-m {artifact}"
    commands = {
        f"encode {name} -o v.npy {model}": 0,
        f"similarity {name} --id-column id --show 3 {model}": 0,
        f"search ☃ 漢字 --in {name} {model}": 0,
        f"dedupe {name} -o d.csv --groups g.csv -t -0.5 {model}": 0,
        f"cluster {name} -o c.csv --min-size 1 -t -0.5 {model}": 0,
        f"heatmap {name} -o h.png {model}": 0,
        f"eval pairs.csv --precision fp32 {model}": 0,
        "info v.npy": 0,
        "info ☃": 1,
        "doctor ☃": 1,
        f"encode {name} -c ☃ -o w.npy {model}": 2,
    }
    (tmp_path / "commands").write_text("\n".join(commands), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CONSOLE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "0"} | console,
        capture_output=True,
    )
    codes = [int(line[2:]) for line in done.stdout.splitlines() if line.startswith(b"= ")]
    assert codes == list(commands.values()), (done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr
    if name == "данные.csv":
        assert "naïve \\u6f22\\u5b57".encode("cp1252") in done.stdout


def ids(name, *columns):
    return [tuple(row[column] for column in columns) for row in read_rows(name)]


def rows(name, *columns):
    return [tuple(map(int, cells)) for cells in ids(name, *columns)]


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_without_a_text_fail_or_are_skipped_or_blanked(command, tmp_path, name):
    (tmp_path / "a.jsonl").write_text(BAD)
    code, _, err = command(name, "a.jsonl")
    assert (code, "row 1 " in err, "--on-error" in err) == (1, True, True)
    for choice in ("skip", "blank"):
        code, out, err = command(name, "a.jsonl", "--on-error", choice, "--force")
        assert (code, err) == (0, "")
        assert "row 1" in out
    assert command(name, "a.jsonl", "--on-error", "guess", "--force")[0] == 2


def test_skipped_rows_keep_their_numbers(command, tmp_path):
    (tmp_path / "a.jsonl").write_text(BAD)
    for name, extra in (
        ("encode", ()),
        ("similarity", ("-t", "0.99")),
        ("dedupe", ()),
        ("cluster", ("-t", "0.99")),
    ):
        assert command(name, "a.jsonl", "--on-error", "skip", *extra)[0] == 0
    assert np.load("v.npy").shape == (3, 32)
    assert rows("p.csv", "left", "right") == [(0, 3)]
    assert rows("g.csv", "row", "kept") == [(0, 0), (3, 0)]
    assert rows("c.csv", "row", "cluster") == [(0, 0), (3, 0), (2, 1)]
    skip = ("--on-error", "skip", "-o", "graph", "--force")
    assert "-o DIRECTORY cannot number skipped rows" in command("similarity", "a.jsonl", *skip)[2]


JOINED = ("a.jsonl", "--id-column", "id", "--vectors")


@pytest.mark.parametrize("vectors", [("v.parquet",), (*JOINED, "v.parquet"), (*JOINED, "v.npy")])
def test_ids_name_rows_in_every_output(command, tmp_path, vectors):
    lines = [f'{{"id": "p{row}", {line[1:]}' for row, line in enumerate(BAD.splitlines())]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    skip = ("--on-error", "skip", "--force")
    for output in ("v.npy", "v.parquet"):
        chosen = ("--id-column", "id") * (output == "v.parquet")
        assert command("encode", "a.jsonl", "-o", output, *chosen, *skip)[0] == 0
    assert read_ids("v.parquet") == ["p0", "p2", "p3"]
    joined = (*vectors, *skip)
    call = ("similarity", *joined, "-t", "0.99", "-o", "n.csv", "-k", 1, "--show", 1, "--no-text")
    assert "p0" in command(*call)[1]
    assert ids("p.csv", "left", "right") == [("p0", "p3")]
    assert ids("n.csv", "row", "neighbour")[::2] == [("p0", "p3"), ("p3", "p0")]
    assert "left_text" not in (tmp_path / "p.csv").read_text()
    assert command("search", *joined, "-k", 1, "-o", "s.csv")[0] == 0
    assert ids("s.csv", "row") == [("p0",)]
    if len(vectors) > 1:
        assert command("dedupe", *joined)[0] == 0
        assert ids("g.csv", "row", "kept") == [("p0", "p0"), ("p3", "p0")]
        assert command("cluster", *joined, "-t", "0.99", "--no-text")[0] == 0
        assert ids("c.csv", "row", "cluster") == [("p0", "0"), ("p3", "0"), ("p2", "1")]
        assert "text" not in (tmp_path / "c.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-o", "v.npy", "--id-column", "id"), 2, "VECTORS.parquet"),
        (("-o", "v.parquet", "--id-column", "key"), 2, "no column 'key'; it has: id, text"),
        (("-o", "v.parquet", "--id-column", "id"), 1, "row 1 has no id"),
    ],
)
def test_ids_that_cannot_be_are_one_line(
    reject, artifact, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("id,text\n1,a road\n,the sun\n")
    assert message in reject("encode", "a.csv", "-m", artifact, *arguments, code=code)


@pytest.mark.parametrize("name", COMMANDS)
def test_delimiter_and_column_are_detected_and_printed_or_chosen(command, tmp_path, name):
    (tmp_path / "a.csv").write_text("id;text\n1;a road\n2;the sun\n3;a, b\n")
    code, out, _ = command(name, "a.csv")
    assert code == 0
    assert "Reading a.csv: column 'text' (by its name), delimiter ';'." in out
    (tmp_path / "b.csv").write_text("1~a road\n2~the sun\n")
    chosen = ("--delimiter", "~", "--no-header", "--column", "1", "--force")
    assert "delimiter '~'" in command(name, "b.csv", *chosen)[1]


def test_a_header_that_looks_like_a_text_is_a_warning(command, tmp_path):
    (tmp_path / "a.csv").write_text("hello world\nsecond text\n")
    code, _, err = command("encode", "a.csv", "-q")
    assert (code, "hello world" in err, "--no-header" in err) == (0, True, True)
    assert command("encode", "a.csv", "-q", "--no-header", "--force") == (0, "", "")
    assert np.load("v.npy").shape == (2, 32)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(
    "command",
    [
        "similarity v.npy -o m.npz",
        "heatmap v.npy -o m.png",
        "dedupe t.txt --vectors v.npy -o m.txt",
        "cluster t.txt --vectors v.npy -o m.csv",
    ],
)
def test_quantized_vectors_are_not_compared_as_components(
    reject, tmp_path, monkeypatch, command, dtype
):
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", np.arange(8, dtype=dtype).reshape(2, 4))
    (tmp_path / "t.txt").write_text("a road\na river\n")
    assert f"{dtype} vectors" in reject(*command.split())
    assert not list(tmp_path.glob("m.*"))
