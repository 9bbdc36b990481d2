"""dedupe and cluster: what they write, and one line and an exit code for what they cannot do."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pytest

from onnxsim_embed import Embedder
from onnxsim_embed.similarity.clustering import communities, component_groups, deduplicate

# Three groups (of rows 0 2 6, 1 4, 3 5 8) and a loner, at angles that no threshold below meets.
ANGLES = np.radians([0, 90, 8, 200, 94, 203, 5, 300, 197])
VECTORS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
TEXTS = [
    "road",
    'a "quoted", text',
    "two\nlines",
    "naïve 漢字",
    "",
    "solar",
    "a\ttab",
    "dog",
    "=1+1",
]
KEPT = [0, 1, 3, 7]


@pytest.fixture
def vectors(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path / "vectors.npy"


def columns():
    """The columns of all rows: numbers, texts, and what a text file can only spell out."""
    numbers = list(range(10, 10 + len(TEXTS)))
    return {"id": numbers, "text": TEXTS, "note": [f"n{number}" for number in numbers]}


def write_file(path):
    """Write the rows as what the path's ending says; txt holds the texts alone, on one line each."""
    rows = [dict(zip(columns(), row, strict=True)) for row in zip(*columns().values(), strict=True)]
    kind = path.suffixes[0]
    if kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns()), path)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if kind in (".csv", ".tsv"):
            writer = csv.DictWriter(stream, columns(), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif kind == ".jsonl":
            stream.writelines(f"{json.dumps(row)}\n" for row in rows)
        else:
            stream.writelines(f"{' '.join(text.split())}\n" for text in TEXTS)
    return path


def read_file(path):
    """Read rows as dictionaries; of csv and tsv all values are strings."""
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in stream]
        if path.suffix == ".txt":
            return [{"text": line.removesuffix("\n")} for line in stream]
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


def rows_of(kept, strings=False):
    table = columns()
    if strings:
        table["id"] = [str(number) for number in table["id"]]
    return [{name: table[name][row] for name in table} for row in kept]


# dedupe


@pytest.mark.parametrize("source", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
@pytest.mark.parametrize("target", ["csv", "tsv", "jsonl", "parquet"])
def test_kept_rows_are_written_with_all_their_columns(run, tmp_path, vectors, source, target):
    file, output = write_file(tmp_path / f"in.{source}"), tmp_path / f"out.{target}"
    code, out, err = run("dedupe", file, "-o", output, "--vectors", vectors, "-t", "0.9")
    assert (code, err) == (0, "")
    assert out.startswith(f"Kept 4 of 9 rows -> {output}, in ")
    strings = source.split(".")[0] in ("csv", "tsv") or target in ("csv", "tsv")
    assert read_file(output) == rows_of(KEPT, strings)


def test_lines_are_kept_as_they_stand(run, tmp_path, vectors):
    for name in ("in.txt", "in.jsonl"):
        file, output = write_file(tmp_path / name), tmp_path / f"out{name}"
        assert run("dedupe", file, "-o", output, "--vectors", vectors, "-t", "0.9")[0] == 0
        lines = file.read_bytes().splitlines(True)
        assert output.read_bytes() == b"".join(lines[row] for row in KEPT)


def test_a_line_file_becomes_a_table_and_back(run, tmp_path, vectors):
    file = write_file(tmp_path / "in.txt")
    table, lines = tmp_path / "out.csv", tmp_path / "out.txt"
    common = ("--vectors", vectors, "-t", "1")
    assert run("dedupe", file, "-o", table, *common)[0] == 0
    assert [row["text"] for row in read_file(table)] == [" ".join(text.split()) for text in TEXTS]
    assert run("dedupe", table, "-o", lines, *common)[0] == 0
    assert lines.read_bytes() == file.read_bytes()


def test_types_of_parquet_are_kept(run, tmp_path, vectors):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {"text": TEXTS, "n": pyarrow.array(range(9), pyarrow.int8()), "tags": [["a", None]] * 9}
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    for target in ("parquet", "jsonl", "csv"):
        output = tmp_path / f"out.{target}"
        arguments = ("-o", output, "--vectors", vectors, "-t", "0.9")
        assert run("dedupe", tmp_path / "in.parquet", *arguments)[0] == 0
    assert parquet.read_table(tmp_path / "out.parquet").schema == table.schema
    assert read_file(tmp_path / "out.jsonl")[1]["tags"] == ["a", None]
    assert read_file(tmp_path / "out.csv")[1]["tags"] == '["a", null]'


def test_rows_of_jsonl_may_differ_and_hold_anything(run, tmp_path):
    rows = [{"text": "a", "n": 1}, {"text": "b", "ok": True, "deep": {"é": [1]}}, {"text": "c"}]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    np.save(tmp_path / "v.npy", np.eye(3))
    output = tmp_path / "out.csv"
    assert run("dedupe", file, "-o", output, "--vectors", tmp_path / "v.npy")[0] == 0
    assert output.read_text(encoding="utf-8").splitlines() == [
        "text,n,ok,deep",
        "a,1,,",
        'b,,true,"{""é"": [1]}"',
        "c,,,",
    ]


def test_jsonl_of_plain_strings_is_one_column(run, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('"a b"\n"c\\nd"\n', encoding="utf-8")
    np.save(tmp_path / "v.npy", np.eye(2))
    for name, expected in (("out.jsonl", file.read_text()), ("out.csv", 'text\na b\n"c\nd"\n')):
        output = tmp_path / name
        assert run("dedupe", file, "-o", output, "--vectors", tmp_path / "v.npy")[0] == 0
        assert output.read_text() == expected


def test_rows_of_csv_may_be_short_blank_or_long(run, tmp_path):
    file, output = tmp_path / "in.csv", tmp_path / "out.csv"
    file.write_text(f"text,note\na\n\n{'b' * 200_000},x\n", encoding="utf-8")
    np.save(tmp_path / "v.npy", np.eye(3))
    assert run("dedupe", file, "-o", output, "--vectors", tmp_path / "v.npy")[0] == 0
    assert output.read_text(encoding="utf-8") == f"text,note\na,\n,\n{'b' * 200_000},x\n"


def test_groups_say_which_rows_belong_together(run, tmp_path, vectors):
    file, groups = write_file(tmp_path / "in.csv"), tmp_path / "groups.csv"
    output = tmp_path / "out.csv"
    arguments = ("--vectors", vectors, "-t", "0.9", "--groups", groups)
    code, out, _ = run("dedupe", file, "-o", output, *arguments)
    assert code == 0
    assert f"rows -> {output}, 3 groups -> {groups}, in " in out
    rows = read_file(groups)
    assert [(int(row["row"]), int(row["kept"])) for row in rows] == [
        (0, 0), (2, 0), (6, 0), (1, 1), (4, 1), (3, 3), (5, 3), (8, 3)
    ]  # fmt: skip
    assert [row["text"] for row in rows] == [TEXTS[int(row["row"])] for row in rows]
    scores = deduplicate(VECTORS, 0.9).scores
    assert [np.float32(row["score"]) for row in rows] == [scores[int(row["row"])] for row in rows]


def test_groups_may_be_none(run, tmp_path, vectors):
    file, groups = write_file(tmp_path / "in.csv"), tmp_path / "groups.csv"
    arguments = ("-o", tmp_path / "out.csv", "--vectors", vectors, "-t", "1", "--groups", groups)
    assert run("dedupe", file, *arguments)[0] == 0
    assert groups.read_text() == "row,kept,score,text\n"


def test_without_vectors_the_texts_are_encoded(run, tmp_path, artifact):
    file, output = write_file(tmp_path / "in.csv"), tmp_path / "out.csv"
    code, out, err = run("dedupe", file, "-o", output, "-m", artifact, "-c", "note", "-t", "0.5")
    assert (code, err) == (0, "")
    assert out.startswith("Encoded 9 texts ")
    kept = deduplicate(Embedder(artifact).encode(columns()["note"]), 0.5).kept
    assert read_file(output) == rows_of(kept, strings=True)
    assert len(kept) < 9


def test_a_file_may_replace_itself_by_force(run, tmp_path, vectors):
    file = write_file(tmp_path / "in.csv")
    arguments = ("dedupe", file, "-o", file, "--vectors", vectors, "-t", "0.9", "--force", "-q")
    assert run(*arguments) == (0, "", "")
    assert read_file(file) == rows_of(KEPT, strings=True)


# cluster


@pytest.mark.parametrize("method", ["communities", "components"])
@pytest.mark.parametrize("threshold", ["0.9", "0.998"])
def test_clusters_are_written_in_order_and_the_largest_printed(
    run, tmp_path, vectors, method, threshold
):
    file, output = write_file(tmp_path / "in.csv"), tmp_path / "clusters.csv"
    code, out, err = run(
        "cluster", file, "-o", output, "--vectors", vectors, "-t", threshold, "--min-size", "2",
        "--method", method, "--show", "1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    find = communities if method == "communities" else component_groups
    groups = find(VECTORS, float(threshold), 2)
    assert len(groups) > 1
    assert [{name: row[name] for name in row} for row in read_file(output)] == [
        {"row": str(row), "cluster": str(number), "rank": str(rank), "text": TEXTS[row]}
        for number, group in enumerate(groups)
        for rank, row in enumerate(group, start=1)
    ]
    said = f"Found {len(groups)} clusters of {sum(map(len, groups))} of 9 rows -> {output}, in "
    first, second = out.splitlines()
    assert first.startswith(said)
    central = " ".join(TEXTS[groups[0][0]].split())
    assert second == f"{len(groups[0]):>7,} rows  {groups[0][0]}: {central}"


def test_no_clusters_are_an_empty_table(run, tmp_path, vectors):
    file, output = write_file(tmp_path / "in.csv"), tmp_path / "clusters.tsv"
    code, out, _ = run("cluster", file, "-o", output, "--vectors", vectors)
    assert code == 0
    assert out.startswith("Found 0 clusters of 0 of 9 rows")
    assert output.read_text() == "row\tcluster\trank\ttext\n"


def test_clusters_of_encoded_texts(run, tmp_path, artifact):
    file, output = tmp_path / "in.txt", tmp_path / "clusters.csv"
    texts = ["solar energy", "solar  energy\x07 " + "of the sun " * 9, "dog", "the dog", "a dog"]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    code, out, err = run(
        "cluster", file, "-o", output, "-m", artifact, "-t", "-0.9", "--min-size", "1"
    )
    assert (code, err) == (0, "")
    groups = communities(Embedder(artifact).encode(texts), -0.9, 1)
    assert [int(row["row"]) for row in read_file(output)] == np.concatenate(groups).tolist()
    assert out.startswith("Encoded 5 texts ")
    for line in out.splitlines()[2:]:
        assert line.isprintable()
        assert len(line) <= 80


def test_quiet_prints_nothing(run, tmp_path, vectors):
    file = write_file(tmp_path / "in.csv")
    arguments = ("--vectors", vectors, "-q")
    assert run("cluster", file, "-o", tmp_path / "clusters.csv", *arguments) == (0, "", "")
    assert run("dedupe", file, "-o", tmp_path / "out.csv", *arguments) == (0, "", "")


# what cannot be done


def test_outputs_that_exist_are_replaced_only_by_force(run, refuse, tmp_path, vectors):
    file = write_file(tmp_path / "in.csv")
    old = tmp_path / "old.csv"
    old.write_text("old")
    new = tmp_path / "new.csv"
    common = ("--vectors", vectors)
    for arguments in (
        ("dedupe", file, "-o", old, *common),
        ("dedupe", file, "-o", new, "--groups", old, *common),
        ("cluster", file, "-o", old, *common),
    ):
        assert "--force" in refuse(*arguments)
        assert old.read_text() == "old"
        assert run(*arguments, "--force")[0] == 0
        assert old.read_text() != "old"
        old.write_text("old")
        new.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dedupe", "in.csv", "-o", "out.npy"], ".csv, .tsv, .jsonl, .parquet, .txt"),
        (["dedupe", "in.csv", "-o", "out.csv.gz"], "one of .csv, .tsv"),
        (["dedupe", "-", "-o", "out.csv"], "cannot read standard input"),
        (["dedupe", "in.csv", "-o", "out.csv", "--groups", "out.csv"], "target of two outputs"),
        (["dedupe", "in.csv", "-o", "out.csv", "--groups", "g.txt"], "one of .csv, .tsv"),
        (["dedupe", "in.csv", "-o", "no/out.csv"], "there is no directory no"),
        (["dedupe", "none.csv", "-o", "out.csv"], "there is no file none.csv"),
        (["dedupe", "in.csv", "-o", "out.csv", "-c", "none"], "has no column 'none'"),
        (["dedupe", "in.csv", "-o", "out.txt"], "several columns or texts of several lines"),
        (["dedupe", "lines.csv", "-o", "out.txt"], "several columns or texts of several lines"),
        (["dedupe", "twice.csv", "-o", "out.jsonl"], "two columns of one name"),
        (["dedupe", "twice.csv", "-o", "out.parquet"], "two columns of one name"),
        (["dedupe", "mixed.jsonl", "-o", "out.parquet"], "a column of several types"),
        (["dedupe", "in.csv", "-o", "out.csv", "--vectors", "2.npy"], "holds 2 vectors for 9 rows"),
        (["cluster", "in.csv", "-o", "out.csv", "--vectors", "2.npy"], "2 vectors for 9 rows"),
        (["cluster", "in.csv", "-o", "out.npz"], "one of .csv, .tsv"),
        (["cluster", "in.csv", "-o", "out.csv", "--method", "x"], "communities and components"),
        (["cluster", "in.csv", "-o", "out.csv", "--vectors", "9.npy", "-t", "-1"], "above -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(refuse, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "in.csv")
    (tmp_path / "lines.csv").write_text('text\n"a\nb"\n')
    (tmp_path / "twice.csv").write_text("text,n,n\na,1,2\n")
    (tmp_path / "mixed.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "c"}\n')
    np.save("2.npy", VECTORS[:2])
    np.save("9.npy", VECTORS)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert message in refuse(*arguments, code=1 if "there is no" in message else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", ["csv", "parquet"])
def test_damaged_files_are_named(refuse, tmp_path, target):
    file, output = tmp_path / "in.csv", tmp_path / f"out.{target}"
    file.write_bytes(b'text\n"a\n')
    assert str(file) in refuse("dedupe", file, "-o", output, code=1)
    file.write_bytes(b"text\n\xff\n")
    assert "is not UTF-8" in refuse("dedupe", file, "-o", output, code=1)
    assert not output.exists()


def test_two_columns_of_one_name_are_an_error(refuse, tmp_path):
    file, output = tmp_path / "in.csv", tmp_path / "out.csv"
    file.write_text("text,n,n\na,1,2\nb,3,4\n")
    assert "n" in refuse("dedupe", file, "-o", output, "--vectors", tmp_path / "v.npy")
