"""dedupe and cluster: outputs and errors. Formats of rows are tested in files/test_tables.py."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pytest
from support import read_rows as read

from onnxsim_embed import Embedder
from onnxsim_embed.cli.graph_files import digits
from onnxsim_embed.similarity.clustering import communities, component_groups, least_similarities
from onnxsim_embed.similarity.duplicates import deduplicate

# Three groups (rows 0 2 6, 1 4, 3 5 8) and one single row, at angles that no threshold below meets.
ANGLES = np.radians([0, 90, 8, 200, 94, 203, 5, 300, 197])
VECTORS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
TEXTS = [
    "road",
    'a "quoted", text',
    "two\nlines",
    "naïve 漢字",
    "rain",
    "solar",
    "a\ttab",
    "dog",
    "=1",
]
ROWS = [{"id": str(10 + row), "text": text} for row, text in enumerate(TEXTS)]
KEPT = [0, 1, 3, 7]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """in.csv, in.jsonl.gz and v.npy in the current directory."""
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", VECTORS)
    with open("in.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "text"])
        writer.writeheader()
        writer.writerows(ROWS)
    with gzip.open("in.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(f"{json.dumps(row)}\n" for row in ROWS)
    return tmp_path


@pytest.mark.parametrize("source", ["in.csv", "in.jsonl.gz"])
def test_kept_rows_have_all_their_columns_and_groups_name_them(succeed, files, source):
    arguments = ("--vectors", "v.npy", "-t", "0.9", "--groups", "groups.csv")
    out = succeed("dedupe", source, "-o", "out.csv", *arguments)
    assert "Kept 4 of 9 rows -> out.csv, 3 groups -> groups.csv, in " in out
    assert read("out.csv") == [ROWS[row] for row in KEPT]
    rows = read("groups.csv")
    assert [(int(row["row"]), int(row["kept"])) for row in rows] == [
        (0, 0), (2, 0), (6, 0), (1, 1), (4, 1), (3, 3), (5, 3), (8, 3)
    ]  # fmt: skip
    assert [row["text"] for row in rows] == [TEXTS[int(row["row"])] for row in rows]
    scores = deduplicate(VECTORS, 0.9).scores
    assert [np.float32(row["score"]) for row in rows] == [scores[int(row["row"])] for row in rows]
    arguments = ("--vectors", "v.npy", "-t", "1", "--groups", "groups.csv", "--force")
    succeed("dedupe", source, "-o", "out.csv", *arguments)
    assert read("groups.csv") == []


@pytest.mark.parametrize("reference", [None, "old.npy", "old.csv"])
def test_a_report_names_what_stands_for_each_dropped_row(succeed, files, artifact, reference):
    np.save("old.npy", VECTORS[[7, 4]])
    (files / "old.csv").write_text("id,text\na,dog\nb,rain\n")
    arguments = ["-t", "0.9", "--report", "r.csv", "--max-memory", "1MB", "-q"]
    arguments += ["-m", artifact] if reference == "old.csv" else ["--vectors", "v.npy"]
    arguments += ["--reference", reference] if reference else []
    succeed("dedupe", "in.csv", "-o", "out.csv", *arguments)
    vectors = Embedder(artifact).encode(TEXTS) if reference == "old.csv" else VECTORS
    others = vectors[[7, 4]] if reference else None
    found = deduplicate(vectors, 0.9, texts=TEXTS, reference=others)
    assert read("out.csv") == [ROWS[row] for row in found.kept]
    rows = read("r.csv")
    for row, kept, other, score in zip(rows, *found.dropped(), strict=True):
        outside = found.first[other] < 0
        text = (
            TEXTS[kept] if not outside else ["dog", "rain"][kept] if reference == "old.csv" else ""
        )
        assert row == {
            "row": str(other), "kept": str(kept), "file": reference if outside else "in.csv",
            "score": row["score"], "text": TEXTS[other], "kept_text": text,
        }  # fmt: skip
        assert np.float32(row["score"]) == score
    assert {"7"} <= {row["row"] for row in rows} or reference is None


def test_a_cluster_of_most_rows_is_warned_about(run, files):
    np.save("w.npy", np.ones((120, 2), np.float32))
    (files / "w.txt").write_text("\n".join(f"text {row}" for row in range(120)) + "\n")
    arguments = ("cluster", "w.txt", "-o", "c.csv", "--vectors", "w.npy", "--method", "components")
    code, _, err = run(*arguments)
    assert code == 0
    assert "120 of 120 rows" in err


def test_rows_that_the_model_does_not_tell_apart_are_kept_and_named(run, files, artifact):
    head = "data code cat dog " * 20
    texts = [head + "one", head + "two", "☂", "☂ ☃", "", "", head + "two", "Dog", "dóg", "☂"]
    (files / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    arguments = ("dedupe", "in.txt", "-o", "out.txt", "-m", artifact, "-t", "0.99", "-q", "--force")

    def kept():
        return (files / "out.txt").read_text(encoding="utf-8").splitlines()

    code, out, err = run(*arguments)
    assert (code, out, kept()) == (0, "", [texts[row] for row in (0, 1, 2, 3, 4, 5, 7)])
    assert "4 of 10 rows" in err
    assert err.endswith("(--drop-unseen drops them): rows 1, 3, 4, 5.\n")
    code, out, err = run(*arguments, "--drop-unseen")
    assert (code, out, kept()) == (0, "", [texts[row] for row in (0, 2, 7)])
    assert ": rows 1, 3, 4, 5.\n" in err
    assert run("encode", "in.txt", "-o", "t.npy", "-m", artifact, "-q") == (0, "", "")
    code, out, err = run(*arguments, "--vectors", "t.npy")
    assert (code, out, kept()) == (0, "", [texts[row] for row in (0, 1, 2, 3, 4, 5, 7)])
    cluster = ("cluster", "in.txt", "-o", "c.csv", "-m", artifact, "--min-size", "2", "-t", "0.99")
    for extra, rows in (((), [0, 1, 6, 7, 8]), (("--drop-unseen", "--force"), [0, 6, 7, 8])):
        code, out, err = run(*cluster, *extra)
        assert (code, [int(row["row"]) for row in read("c.csv")]) == (0, rows)
        assert "4 of 10 rows" in err
        assert "Of tokens unknown to the model only: 3 texts, rows 2, 3, 9." in out


def test_a_dropped_row_that_was_truncated_is_named(run, files, artifact):
    texts = ["data code cat dog " * 20, "code data cat dog " * 20 + "road", "road"]
    (files / "in.txt").write_text("\n".join(texts) + "\n")
    code, _, err = run("dedupe", "in.txt", "-o", "out.txt", "-m", artifact, "-t", "0.8", "-q")
    assert (code, err.count("\n"), err.endswith("maximum length: row 1.\n")) == (0, 1, True)


@pytest.mark.parametrize("method", ["communities", "components"])
def test_clusters_are_in_order_and_the_largest_is_printed(succeed, files, method):
    options = ("--vectors", "v.npy", "-t", "0.9", "--min-size", "2", "--show", "1")
    out = succeed("cluster", "in.csv", "-o", "c.csv", "--method", method, *options)
    find = communities if method == "communities" else component_groups
    groups = find(VECTORS, 0.9, 2)
    lowest = digits(least_similarities(VECTORS, groups))
    expected = [
        [str(row), str(number), str(rank), least, TEXTS[row]]
        for number, (group, least) in enumerate(zip(groups, lowest, strict=True))
        for rank, row in enumerate(group, start=1)
    ]
    assert [list(row.values()) for row in read("c.csv")] == expected
    first, second = out.splitlines()[-2:]
    members = sum(map(len, groups))
    assert first.startswith(f"Found {len(groups)} clusters of {members} of 9 rows -> c.csv, in ")
    central = " ".join(TEXTS[groups[0][0]].split())
    assert (
        second.strip()
        == f"{len(groups[0])} rows  {float(lowest[0]):.2f}  {groups[0][0]}: {central}"
    )


def test_no_clusters_are_an_empty_table(succeed, files):
    out = succeed("cluster", "in.csv", "-o", "c.tsv", "--vectors", "v.npy")
    assert "Found 0 clusters of 0 of 9 rows" in out
    assert (files / "c.tsv").read_text() == "row\tcluster\trank\tleast\ttext\n"


def test_printed_texts_are_short_and_printable(succeed, files, artifact):
    texts = ["solar energy", "solar  energy\x07 " + "of the sun " * 9, "dog", "the dog", "a dog"]
    (files / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    options = ("-m", artifact, "-t", "-0.9", "--min-size", "1")
    out = succeed("cluster", "in.txt", "-o", "c.csv", *options)
    groups = communities(Embedder(artifact).encode(texts), -0.9, 1)
    assert [int(row["row"]) for row in read("c.csv")] == np.concatenate(groups).tolist()
    assert all(line.isprintable() and len(line) <= 80 for line in out.splitlines()[3:])


@pytest.mark.parametrize(
    "arguments",
    [
        ("dedupe", "in.csv", "-o", "old.csv"),
        ("dedupe", "in.csv", "-o", "new.csv", "--groups", "old.csv"),
        ("cluster", "in.csv", "-o", "old.csv"),
    ],
)
def test_outputs_are_replaced_only_by_force_and_quietly(run, reject, files, arguments):
    (files / "old.csv").write_text("old")
    arguments = (*arguments, "--vectors", "v.npy", "-q", "-t", "0.9")
    assert "--force" in reject(*arguments)
    assert (files / "old.csv").read_text() == "old"
    assert run(*arguments, "--force") == (0, "", "")
    assert (files / "old.csv").read_text() != "old"
    if arguments[0] == "dedupe":  # even the input may be replaced
        assert run("dedupe", "in.csv", "-o", "in.csv", *arguments[-5:], "--force") == (0, "", "")
        assert read("in.csv") == [ROWS[row] for row in KEPT]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dedupe", "in.csv", "-o", "out.npy"], ".csv, .tsv, .jsonl, .parquet, .txt"),
        (["dedupe", "-", "-o", "out.csv"], "standard input"),
        (["dedupe", "in.csv", "-o", "out.csv", "--groups", "out.csv"], "two outputs"),
        (["dedupe", "in.csv", "-o", "out.csv", "--groups", "g.txt"], ".csv, .tsv"),
        (["dedupe", "in.csv", "-o", "out.csv", "--groups", "g.csv", "--report", "g.csv"], "two outputs"),
        (["dedupe", "in.csv", "-o", "out.csv", "--vectors", "v.npy", "--max-memory", "x"], "'x'"),
        (["dedupe", "in.csv", "-o", "out.txt"], "several"),
        (["cluster", "in.csv", "-o", "out.csv", "--vectors", "2.npy"], "2 vectors for 9 rows"),
        (["cluster", "in.csv", "-o", "out.npz"], ".csv, .tsv"),
        (["cluster", "in.csv", "-o", "out.csv", "--method", "x"], "communities and components"),
        (["cluster", "in.csv", "-o", "out.csv", "--vectors", "v.npy", "-t", "-1"], "-1"),
    ],
)  # fmt: skip
def test_a_wrong_call_writes_nothing(reject, files, arguments, message):
    np.save("2.npy", VECTORS[:2])
    before = sorted(files.iterdir())
    assert message in reject(*arguments)
    assert sorted(files.iterdir()) == before
