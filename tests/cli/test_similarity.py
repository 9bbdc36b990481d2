"""similarity: files, directories of shards, estimates and limits of memory."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse
from support import TEXTS, names, read_rows

from onnxsim_embed import open_graph
from onnxsim_embed.similarity import memory as budget
from onnxsim_embed.similarity.compare import (
    closest_pairs,
    estimate_similarity,
    neighbours,
    similar_pairs,
    similarity_matrix,
)

RNG = np.random.default_rng(1)
CENTRES = RNG.standard_normal((6, 16))[RNG.integers(0, 6, 120)]
VECTORS = (CENTRES + 0.5 * RNG.standard_normal((120, 16))).astype(np.float32)


def assert_same(matrix, expected):
    np.testing.assert_array_equal(matrix.toarray(), expected.toarray(), strict=True)


@pytest.fixture
def vectors_npy(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path / "vectors.npy"


# a directory of parts


def test_a_directory_holds_the_matrix_and_is_replaced_by_force(
    succeed, reject, tmp_path, vectors_npy
):
    target = tmp_path / "graph"
    out = succeed("similarity", vectors_npy, "-t", 0.4, "-o", target)
    matrix = similarity_matrix(VECTORS, 0.4)
    assert out.startswith(
        f"Compared 120 rows, {matrix.nnz:,} scores above 0.4 in 1 shard -> {target}"
    )
    assert_same(open_graph(target).to_matrix(), matrix)
    assert names(tmp_path) == ["graph", "vectors.npy"]
    assert "graph exists; replace it with --force" in reject(
        "similarity", vectors_npy, "-o", target
    )
    succeed("similarity", vectors_npy, "-o", target, "-t", 0.9, "--force")
    assert open_graph(target).threshold == 0.9
    (tmp_path / "mine").mkdir()
    message = reject("similarity", vectors_npy, "-o", tmp_path / "mine", "--force")
    assert "mine exists and is not a similarity graph; choose another name" in message


def test_a_directory_holds_the_k_best(succeed, tmp_path, vectors_npy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matrix = ["-o", "m.npz", "-t", 0.9, "--pairs", "p.csv", "--show", 1]
    out = succeed("similarity", vectors_npy, "-o", "graph", "--top-k", 3, *matrix)
    assert "360 scores, top 3 of each row in 1 shard -> graph, " in out
    assert open_graph("graph").k == 3
    assert names(tmp_path) == ["graph", "m.npz", "p.csv", "vectors.npy"]
    out = succeed("similarity", vectors_npy, "-o", "graph", "-o", "n.csv", "-k", 2, "--force")
    assert "top 2 of each row" in out
    assert "2 neighbours of each row -> n.csv" in out


STOPPED = """
from scipy import sparse
from onnxsim_embed.similarity import graph_writer as graph_job
from onnxsim_embed.cli import main
graph_job.SHARD_PAIRS = 1200
save, parts = sparse.save_npz, []
def stopping(stream, matrix, **options):
    if len(parts) == 3:
        raise KeyboardInterrupt
    parts.append(1)
    save(stream, matrix, **options)
sparse.save_npz = stopping
main()
"""


def test_the_same_call_goes_on_after_an_interruption(run, tmp_path, vectors_npy):
    target = tmp_path / "graph"
    call = ["similarity", str(vectors_npy), "-o", str(target), "-t", "0.4"]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, *call], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    kept = "onnxsim-embed: interrupted; 3 shards kept: the same command continues\n"
    assert done.stderr == kept
    parts = tmp_path / ".graph.partial/parts"
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    assert sorted(kept) == [f"part-0000{number}.npz" for number in range(3)]
    code, out, err = run(*call)
    assert (code, err, "in 12 shards" in out) == (0, "", True)
    assert kept.items() <= {n: (target / n).stat().st_mtime_ns for n in names(target)}.items()
    assert_same(open_graph(target).to_matrix(), similarity_matrix(VECTORS, 0.4))
    assert names(tmp_path) == ["graph", "vectors.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "graph", "--drop-duplicates"], "dedupe FILE -o FILE"),
        (["-o", "graph.v2"], "one name without a suffix (a directory of shards)"),
        (
            ["-o", "graph", "--top-k", 120],
            "k must be an integer from 1 to 119 (the other rows), got 120",
        ),
        (["-o", "nowhere/graph"], "nowhere"),
        (["-o", "vectors.npy"], "expected one .npz"),
        (["-o", "m.npz", "-k", 3], "--top-k requires -o neighbours.csv or -o DIRECTORY"),
        (["-o", "n.csv", "-o", "graph"], "-o neighbours.csv requires --top-k"),
        (["-o", "a.npz", "-o", "b.npz"], "b.npz: expected one .npz"),
        (["-o", "n.csv", "--top-k", 120], "119"),
        (["--heatmap", "h.xyz", "-o", "m.npz"], "h.xyz"),
        (["--pairs", "p.xlsx"], ".csv, .tsv"),
        (["-o", "m.npz", "--pairs", "m.npz"], "m.npz"),
    ],
)
def test_outputs_that_make_no_sense_are_refused(
    reject, tmp_path, vectors_npy, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code = 1 if "nowhere" in message else 2
    assert message in reject("similarity", vectors_npy, *arguments, code=code)
    assert names(tmp_path) == ["vectors.npy"]


# estimates and memory


@pytest.mark.parametrize("outputs", [[], ["-o", "m.npz"], ["-o", "graph"], ["--heatmap", "h.png"]])
def test_an_estimate_writes_nothing(run, tmp_path, vectors_npy, monkeypatch, outputs):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("similarity", vectors_npy, "--estimate", "-t", 0.4, *outputs)
    assert (code, err, out.count("\n")) == (0, "", 1)
    entries = str(estimate_similarity(VECTORS, 0.4)).partition(" at the peak")[0]
    assert out.startswith(f"Above 0.4: {entries} at the peak), ")
    assert out.endswith(".\n")
    assert names(tmp_path) == ["vectors.npy"]


@pytest.mark.parametrize("output", [["-o", "m.npz"], ["--pairs", "p.csv"]])
def test_what_does_not_fit_is_one_line(reject, succeed, tmp_path, vectors_npy, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    call = ["similarity", vectors_npy, "-t", -1, "--max-memory", "200kB", *output]
    message = reject(*call, code=1)
    assert "more than " in message
    monkeypatch.setattr(budget, "SMALL_COMPARISON", 1)
    message = reject(*call, code=1)
    assert "about 14,000 scores" in message
    assert "-o DIRECTORY" in message
    options = ["--top-k", 100, "--max-memory", "200kB"]
    assert "-o DIRECTORY" in reject("similarity", vectors_npy, "-o", "n.csv", *options, code=1)
    assert names(tmp_path) == ["vectors.npy"]
    succeed("similarity", vectors_npy, "-o", "graph", *options)
    assert open_graph("graph").nnz == 12_000


def test_no_memory_is_refused_before_any_text_is_encoded(reject, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxsim_embed.cli.inputs.Inputs.open", lambda *_: pytest.fail("it began"))
    message = reject("similarity", tmp_path / "texts.csv", "--max-memory", "0")
    assert "--max-memory must be positive" in message


# what is read and shown


@pytest.mark.parametrize("output", ["m.npz", "graph"])
def test_a_bar_is_for_terminals(run, tmp_path, vectors_npy, monkeypatch, output):
    call = ["similarity", vectors_npy, "-o", tmp_path / output, "--force"]
    assert run(*call)[2] == ""
    monkeypatch.setattr("onnxsim_embed.cli.inputs.on_terminal", lambda: True)
    _, out, err = run(*call)
    assert "Comparing: 100%" in err
    assert "Comparing" not in out
    assert run(*call, "--quiet") == (0, "", "")


# files


@pytest.fixture
def nine_npy(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    vectors[5] = vectors[2]
    np.save(tmp_path / "nine.npy", vectors)
    return tmp_path / "nine.npy"


def test_similarity_of_vectors_writes_everything_the_api_gives(
    succeed, tmp_path, nine_npy, monkeypatch
):
    # The pairs are those of the matrix: scores are computed once.
    monkeypatch.setattr("onnxsim_embed.similarity.compare.similar_pairs", None)
    outputs = {name: tmp_path / name for name in ("m.npz", "n.csv", "p.csv", "h.png")}
    matrix_and_neighbours = ["-o", outputs["m.npz"], "-o", outputs["n.csv"], "--top-k", 3]
    pairs_and_heatmap = ["--pairs", outputs["p.csv"], "--heatmap", outputs["h.png"]]
    out = succeed("similarity", nine_npy, "-t", 0.1, *matrix_and_neighbours, *pairs_and_heatmap)
    assert out.startswith("Compared 9 rows, ")
    assert all(str(path) in out for path in outputs.values())
    vectors = np.load(nine_npy)
    matrix, expected = sparse.load_npz(outputs["m.npz"]), similarity_matrix(vectors, 0.1)
    assert (matrix.dtype, matrix.indices.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(matrix.toarray(), expected.toarray())
    nearest, pairs = neighbours(vectors, 3), similar_pairs(vectors, 0.1)
    nearest_rows = np.repeat(np.arange(9), 3)
    for name, columns, expected in (
        ("n.csv", ("row", "score", "neighbour"), (nearest_rows, *map(np.ravel, nearest))),
        ("p.csv", ("left", "right", "score"), pairs),
    ):
        rows = read_rows(outputs[name])
        for column, values in zip(columns, expected, strict=True):
            assert [np.float32(row[column]) for row in rows] == values.tolist(), column
    assert outputs["h.png"].read_bytes().startswith(b"\x89PNG")


def test_similarity_of_texts_names_them(succeed, tmp_path, artifact, texts_csv):
    arguments = ["--pairs", tmp_path / "p.csv", "--threshold", 0.9, "--show", 2]
    arguments += ["-o", tmp_path / "n.csv", "-k", 2]
    out = succeed("similarity", texts_csv, "-c", "text", "-m", artifact, *arguments)
    for name, columns, sides in (
        ("p.csv", ["left", "right", "score"], ["left", "right"]),
        ("n.csv", ["row", "rank", "neighbour", "score"], ["row", "neighbour"]),
    ):
        rows = read_rows(tmp_path / name)
        assert list(rows[0]) == [*columns, *(f"{side}_text" for side in sides)]
        assert all(row[f"{side}_text"] == TEXTS[int(row[side])] for row in rows for side in sides)
    assert [row["rank"] for row in rows] == ["1", "2"] * len(TEXTS)
    assert len([line for line in out.splitlines() if "  ~  " in line]) == 2


def test_similarity_reads_standard_input(run, artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a road\nthe sun\na road\n")))
    code, out, _ = run("similarity", "-", "-m", artifact, "-q", "--show", 1)
    assert (code, out) == (0, "1.0000  0: a road  ~  2: a road\n")


def test_no_pairs_are_an_empty_table(succeed, tmp_path, nine_npy):
    succeed("similarity", nine_npy, "--pairs", tmp_path / "p.csv", "-t", 1)
    assert (tmp_path / "p.csv").read_text() == "left,right,score\n"


def test_without_outputs_the_ten_closest_pairs_are_printed(run, nine_npy):
    code, out, _ = run("similarity", nine_npy, "--quiet")
    pairs = closest_pairs(np.load(nine_npy), 10)
    expected = [f"{s:.4f}  row {a}  ~  row {b}" for a, b, s in zip(*pairs, strict=True)]
    assert (code, out.splitlines()) == (0, expected)


def test_duplicates_are_dropped_and_rows_keep_their_numbers(
    succeed, tmp_path, artifact, nine_npy, texts_csv
):
    out = succeed("similarity", nine_npy, "--drop-duplicates", "-o", tmp_path / "m.npz", "-t", -1)
    assert "Compared 8 rows (1 duplicate dropped)" in out
    matrix = sparse.load_npz(tmp_path / "m.npz")
    assert matrix.shape == (9, 9)
    np.testing.assert_array_equal(matrix.diagonal(), [1, 1, 1, 1, 1, 0, 1, 1, 1])
    arguments = ["--drop-duplicates", "--pairs", tmp_path / "p.csv", "-t", 0.99]
    out = succeed("similarity", texts_csv, "-m", artifact, *arguments)
    assert "Compared 11 rows (1 duplicate dropped)" in out
    assert not any(row["left_text"] == row["right_text"] for row in read_rows(tmp_path / "p.csv"))
