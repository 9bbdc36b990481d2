"""The command line: what it writes, and one line and an exit code for what it cannot do."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from support import TEXTS
from typer.testing import CliRunner

from onnxsim_embed import Embedder, __version__, cli
from onnxsim_embed.artifact.recipes import recipes
from onnxsim_embed.similarity.compare import (
    closest_pairs,
    neighbours,
    similar_pairs,
    similarity_matrix,
)

COMMANDS = [
    "export",
    "verify",
    "eval",
    "info",
    "models",
    "encode",
    "similarity",
    "dedupe",
    "cluster",
]
PROCESS = [sys.executable, "-c", "from onnxsim_embed.cli import main; main()"]


@pytest.fixture
def vectors_npy(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    vectors[5] = vectors[2]
    np.save(tmp_path / "vectors.npy", vectors)
    return tmp_path / "vectors.npy"


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# saying what there is


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    for command in COMMANDS:
        assert f" {command} " in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: onnxsim-embed {command}" in result.output


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"onnxsim-embed {__version__}\n", "")


def test_models_lists_every_recipe(run):
    code, out, _ = run("models")
    assert code == 0
    for recipe in recipes():
        assert any(line.startswith(f"{recipe.name}  ") for line in out.splitlines())


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "minilm", "BAAI/bge-base-en-v1.5"])
def test_info_says_what_a_recipe_is(run, name):
    code, out, _ = run("info", name)
    assert code == 0
    for field in ("source", "licence", "pooling", "max tokens", "prompts"):
        assert f"\n{field} " in out


def test_info_says_what_an_artifact_is(run, artifact):
    code, out, _ = run("info", artifact)
    assert code == 0
    for part in ("pooling       mean, then L2", "onnx/model.onnx", "onnx/model_int8.onnx", " MB ",
                 "min cosine", "query: 'a dog '"):  # fmt: skip
        assert part in out


def test_info_of_what_is_no_artifact_says_how_to_make_one(refuse, tmp_path, checkpoint):
    assert "is not an exported model" in refuse("info", tmp_path, code=1)
    assert "onnxsim_embed.json" in refuse("info", checkpoint, code=1)
    assert "onnxsim-embed models" in refuse("info", "no-such-model", code=1)


# export


def test_export_prints_what_was_written_and_how_faithful_it_is(run, tmp_path, checkpoint):
    target = tmp_path / "new"
    code, out, err = run("export", checkpoint, "-o", target)
    assert (code, err) == (0, "")
    for part in ("fp32 ", "int8 ", "onnx/model.onnx", " MB ", "min cosine", "PyTorch", str(target)):
        assert part in out
    assert names(tmp_path) == ["new"]
    assert Embedder(target).encode("a road").shape == (32,)


def test_export_replaces_an_artifact_only_by_force(run, refuse, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("export", checkpoint, "--precision", "fp32")[0] == 0
    target = tmp_path / f"{checkpoint.name}-onnx"  # the default name
    before = (target / "onnxsim_embed.json").read_bytes()
    assert "--force" in refuse("export", checkpoint)
    assert (target / "onnxsim_embed.json").read_bytes() == before
    assert run("export", checkpoint, "--force")[0] == 0
    assert (target / "onnx/model_int8.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--precision", "fp64"], 2, "unknown precision 'fp64'"),
        (["--pooling", "median"], 2, "unknown pooling 'median'"),
    ],
)
def test_export_refuses_what_it_does_not_know(
    refuse, tmp_path, checkpoint, arguments, code, message
):
    target = tmp_path / "new"
    assert message in refuse("export", checkpoint, "-o", target, *arguments, code=code)
    assert names(tmp_path) == []


def test_export_of_no_model_lists_the_recipes(refuse, tmp_path):
    message = refuse("export", tmp_path / "nowhere", "-o", tmp_path / "new", code=1)
    assert "all-MiniLM-L6-v2" in message
    assert names(tmp_path) == []


def test_verify_compares_an_artifact_with_its_checkpoint(run, artifact, checkpoint):
    code, out, err = run("verify", artifact, "--against", checkpoint)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.split("\n") if line.startswith(("fp32", "int8"))] == [
        "fp32",
        "int8",
    ]


def test_verify_exits_with_one_below_the_bar(run, artifact):
    code, out, err = run("verify", artifact, "--bar", "1,1")
    assert code == 1
    assert "int8" in out
    assert err.startswith("onnxsim-embed: int8 is not faithful to fp32")
    assert err.count("\n") == 1


@pytest.mark.parametrize("bar", ["1", "a,b", "2,0", "0.9,0.8,0.7", "nan,nan"])
def test_a_bar_is_two_cosines(refuse, artifact, bar):
    assert "--min-fidelity: expected" in refuse("verify", artifact, "--min-fidelity", bar)


def test_eval_shows_each_precision_side_by_side(run, refuse, tmp_path, artifact):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a road,the road,4\nthe sun,a dog,1\nriver,water,3\n", encoding="utf-8")
    code, out, err = run("eval", pairs, "-m", artifact)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.split("\n") if line.startswith(("fp32", "int8"))] == [
        "fp32",
        "int8",
    ]
    assert "Spearman" in out
    pairs.write_text("a road,the road\n", encoding="utf-8")
    assert "line 1" in refuse("eval", pairs, "-m", artifact, code=1)


def test_calibration_texts_are_taken_from_a_file(run, refuse, tmp_path, checkpoint):
    texts, target = tmp_path / "texts.csv", tmp_path / "new"
    lines = "".join(f"{i},project {i} in the village\n" for i in range(30))
    texts.write_text(f"id,name\n{lines}", encoding="utf-8")
    arguments = ["export", checkpoint, "-o", target, "--calibrate", texts]
    assert "id, name" in refuse(*arguments)
    code, out, _ = run(*arguments, "--column", "name", "--bar", "0.5,0.1")
    assert (code, target.is_dir()) == (0, True), out


# similarity


@pytest.mark.parametrize(
    ("command", "name"),
    [("encode", "v.npy"), ("similarity", "m.npz"), ("dedupe", "k.csv"), ("cluster", "c.csv")],
)
def test_an_output_that_cannot_be_written_is_named_first(refuse, tmp_path, command, name):
    output = tmp_path / "nowhere" / name
    message = refuse(command, tmp_path / "missing.csv", "-o", output, code=1)
    assert f"there is no directory {output.parent}" in message


def test_similarity_of_vectors_writes_everything_the_api_gives(run, tmp_path, vectors_npy):
    outputs = {name: tmp_path / name for name in ("m.npz", "n.csv", "p.csv", "h.png")}
    matrix_and_neighbours = ["-o", outputs["m.npz"], "-o", outputs["n.csv"], "--top-k", 3]
    pairs_and_heatmap = ["--pairs", outputs["p.csv"], "--heatmap", outputs["h.png"]]
    code, out, err = run(
        "similarity", vectors_npy, "-t", 0.1, *matrix_and_neighbours, *pairs_and_heatmap
    )
    assert (code, err) == (0, "")
    assert out.startswith("Compared 9 rows, ")
    assert all(str(path) in out for path in outputs.values())
    vectors = np.load(vectors_npy)
    matrix, expected = sparse.load_npz(outputs["m.npz"]), similarity_matrix(vectors, 0.1)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), expected.toarray())
    best = neighbours(vectors, 3)
    rows = read_rows(outputs["n.csv"])
    assert [int(row["neighbour"]) for row in rows] == best.indices.ravel().tolist()
    assert [np.float32(row["score"]) for row in rows] == best.scores.ravel().tolist()
    pairs, rows = similar_pairs(vectors, 0.1), read_rows(outputs["p.csv"])
    assert [int(row["left"]) for row in rows] == pairs.left.tolist()
    assert [int(row["right"]) for row in rows] == pairs.right.tolist()
    assert [np.float32(row["score"]) for row in rows] == pairs.scores.tolist()
    assert outputs["h.png"].read_bytes().startswith(b"\x89PNG")


def test_similarity_of_texts_names_them(run, tmp_path, artifact, texts_csv):
    arguments = ["--pairs", tmp_path / "p.csv", "--threshold", 0.9, "--show", 2]
    code, out, _ = run("similarity", texts_csv, "-c", "text", "-m", artifact, *arguments)
    assert code == 0
    first = read_rows(tmp_path / "p.csv")[0]
    assert list(first) == ["left", "right", "score", "left_text", "right_text"]
    assert first["left_text"] == TEXTS[int(first["left"])]
    assert len([line for line in out.splitlines() if "  ~  " in line]) == 2


def test_similarity_reads_standard_input(run, artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a road\nthe sun\na road\n")))
    code, out, _ = run("similarity", "-", "-m", artifact, "-q", "--show", 1)
    assert (code, out) == (0, "1.0000  0: a road  ~  2: a road\n")


def test_without_outputs_the_ten_closest_pairs_are_printed(run, vectors_npy):
    code, out, _ = run("similarity", vectors_npy, "--quiet")
    pairs = closest_pairs(np.load(vectors_npy), 10)
    expected = [f"{s:.4f}  row {a}  ~  row {b}" for a, b, s in zip(*pairs, strict=True)]
    assert (code, out.splitlines()) == (0, expected)


def test_duplicates_are_dropped_and_rows_keep_their_numbers(
    run, tmp_path, artifact, vectors_npy, texts_csv
):
    code, out, _ = run(
        "similarity", vectors_npy, "--drop-duplicates", "-o", tmp_path / "m.npz", "-t", -1
    )
    assert code == 0
    assert "Compared 8 rows (1 duplicate dropped)" in out
    matrix = sparse.load_npz(tmp_path / "m.npz")
    assert matrix.shape == (9, 9)
    np.testing.assert_array_equal(matrix.diagonal(), [1, 1, 1, 1, 1, 0, 1, 1, 1])
    arguments = ["--drop-duplicates", "--pairs", tmp_path / "p.csv", "-t", 0.99]
    code, out, _ = run("similarity", texts_csv, "-m", artifact, *arguments)
    assert "Compared 11 rows (1 duplicate dropped)" in out
    assert not any(row["left_text"] == row["right_text"] for row in read_rows(tmp_path / "p.csv"))


def test_vectors_of_parquet_are_compared(run, tmp_path, vectors_npy):
    from onnxsim_embed.files.vectors import write_vectors

    write_vectors(np.load(vectors_npy), tmp_path / "v.parquet")
    assert run("similarity", tmp_path / "v.parquet", "-q") == run("similarity", vectors_npy, "-q")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "m.txt"], "m.txt: expected one .npz (matrix), one .csv or .tsv (neighbours)"),
        (["-o", "a.npz", "-o", "b.npz"], "expected one .npz"),
        (["--top-k", 3], "--top-k requires -o neighbours.csv"),
        (["-o", "n.csv"], "-o neighbours.csv requires --top-k"),
        (["-o", "m.npz", "--top-k", 3], "--top-k requires -o"),
        (["-o", "n.csv", "--top-k", 9], "k must be from 1 to 8"),
        (["--heatmap", "h.xyz"], "pictures can be"),
        (["--heatmap", "h.xyz", "-o", "m.npz"], "pictures can be"),
        (["--pairs", "p.xlsx"], ".csv"),
        (["-o", "m.npz", "--pairs", "m.npz"], "m.npz"),
    ],
)
def test_outputs_that_make_no_sense_are_refused_and_nothing_is_written(
    refuse, tmp_path, vectors_npy, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refuse("similarity", vectors_npy, *arguments)
    assert names(tmp_path) == ["vectors.npy"]


@pytest.mark.parametrize(
    ("option", "name"), [("-o", "m.npz"), ("--pairs", "p.csv"), ("--heatmap", "h.png")]
)
def test_no_output_of_similarity_is_replaced_unasked(refuse, tmp_path, vectors_npy, option, name):
    (tmp_path / name).write_text("mine")
    assert "--force" in refuse("similarity", vectors_npy, option, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_vectors_with_nan_are_named_by_row(refuse, tmp_path):
    np.save(tmp_path / "v.npy", np.array([[1, 2], [np.nan, 1]], np.float32))
    assert "row 1" in refuse("similarity", tmp_path / "v.npy")


def test_a_heatmap_of_too_many_rows_is_refused(refuse, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2001, 2), np.float32))
    message = refuse("similarity", tmp_path / "v.npy", "--heatmap", tmp_path / "h.png")
    assert "at most 2,000 rows" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["encode"],
        ["encode", "a.csv"],
        ["similarity", "v.npy", "-t", "2"],
        ["encode", "a.csv", "-o", "v.npy", "--threads", "0"],
        ["models", "--no-such-option"],
    ],
)
def test_a_wrong_call_exits_with_two_and_shows_the_usage(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


# as a process of its own


def process(*arguments):
    return subprocess.run([*PROCESS, *arguments], capture_output=True, text=True, check=False)


def test_a_failure_shows_a_traceback_only_for_debugging(tmp_path):
    missing = [str(tmp_path / "none.npy")]
    plain = process("similarity", *missing)
    debug = process("--debug", "similarity", *missing)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr == f"onnxsim-embed: there is no file {missing[0]}\n"
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert f"there is no file {missing[0]}" in debug.stderr


def test_output_cut_short_by_a_reader_is_no_traceback():
    with subprocess.Popen(
        [*PROCESS, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_the_script_is_installed():
    from importlib.metadata import entry_points

    (script,) = (
        entry for entry in entry_points(group="console_scripts") if entry.name == "onnxsim-embed"
    )
    assert script.load() is cli.main
    assert Path(cli.__file__).parent.name == "cli"


# Exports of other kinds


def test_sizes_and_fidelity_stand_in_one_table(run, checkpoint, tmp_path, few_texts):
    code, out, err = run(
        "export", checkpoint, "-o", tmp_path / "a", "--precision", "fp32,int8,fp16",
        "--matryoshka-dims", "16, 8", "--prompt", "query=find: ", "--max-seq-length", "32",
    )  # fmt: skip
    assert (code, err) == (0, "")
    header = next(line for line in out.splitlines() if "min cosine" in line)
    assert header.split()[:2] == ["precision", "size"]
    for precision in ("fp32", "int8", "fp16"):
        assert re.search(rf"^{precision} +\d+\.\d MB +(PyTorch|fp32) ", out, re.MULTILINE)
    for fact in ("directly", "matryoshka dims  16, 8", "query: 'find: '", "max tokens       32"):
        assert fact in out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt", "query", "NAME=TEXT"),
        ("--prompt", "=x", "NAME=TEXT"),
        ("--matryoshka-dims", "16,x", "256,128,64 or the like, got 'x'"),
        ("--via", "magic", "known are auto, direct, optimum, adopt"),
        ("--precision", "fp8", "known are fp32, int8, fp16"),
    ],
)
def test_a_wrong_option_of_export_says_what_is_allowed(
    refuse, checkpoint, tmp_path, option, value, message
):
    assert message in refuse("export", checkpoint, "-o", tmp_path / "a", option, value)


def test_models_verify_says_what_went_how(run, monkeypatch, checkpoint):
    from onnxsim_embed.artifact import recipes
    from onnxsim_embed.errors import CheckpointError

    real = recipes.find_recipe("all-MiniLM-L6-v2")
    ours = [replace(real, name=name) for name in ("absent", "broken", "fine")]
    report = {"min_cosine": 1.0, "reference": "PyTorch", "problems": []}

    def verify_recipe(recipe, **options):
        if recipe.name == "absent":
            raise CheckpointError("cannot get it")
        return report | {"problems": ["norms are off"] if recipe.name == "broken" else []}

    monkeypatch.setattr(recipes, "recipes", lambda: tuple(ours))
    monkeypatch.setattr("onnxsim_embed.export.verify_recipe", verify_recipe)
    code, out, err = run("models", "--verify")
    assert code == 1
    assert err == "onnxsim-embed: broken: norms are off\n"
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "no weights" in rows["absent"]
    assert "MISSED" in rows["broken"]
    assert "reproduced" in rows["fine"]
    assert "not available: absent.\nThe first error: cannot get it" in out
    monkeypatch.setattr(recipes, "recipes", lambda: (ours[0], ours[2]))
    assert run("models", "--verify")[0] == 0
