"""search: what it prints and writes, and one line and an exit code for what it cannot do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from support import TEXTS, read_rows, write_checkpoint

from onnxsim_embed import Embedder, top_k
from onnxsim_embed.export import export_model
from onnxsim_embed.runtime.encode_to_file import encode_to_file

QUERY = "water for the village"


@pytest.fixture(scope="module")
def files(artifact, tmp_path_factory):
    """The vectors of TEXTS and the texts, as files."""
    directory = tmp_path_factory.mktemp("search")
    np.save(directory / "vectors.npy", Embedder(artifact).encode_document(TEXTS))
    lines = [json.dumps({"id": row, "text": text}) for row, text in enumerate(TEXTS)]
    (directory / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def search(run, artifact, files):
    def call(*arguments, where="vectors.npy"):
        return run("search", *arguments, "--in", files / where, "-m", artifact)

    return call


@pytest.fixture(scope="module")
def expected(artifact):
    model = Embedder(artifact)
    return top_k(model.encode_query([QUERY]), model.encode_document(TEXTS), len(TEXTS))


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return read_rows(path)


def test_rank_score_row_and_text_are_printed(search, files, expected):
    code, out, err = search(QUERY, "--texts", files / "texts.jsonl", "-k", 3)
    assert (code, err) == (0, "")
    title, header, *lines = out.strip().split("\n\n")[-1].splitlines()
    assert title == f"{QUERY}: 3 of 12 rows"
    assert header.split() == ["rank", "score", "row", "text"]
    for rank, line in enumerate(lines, start=1):
        row, score = expected.indices[0, rank - 1], expected.scores[0, rank - 1]
        text = " ".join(TEXTS[row].split())
        assert line.split()[:3] == [str(rank), f"{score:.4f}", str(row)]
        assert line.endswith(text) or line.endswith("…")


def test_the_query_prompt_counts(search, artifact):
    plain = top_k(Embedder(artifact).encode(QUERY), Embedder(artifact).encode(TEXTS), 1)
    _, out, _ = search(QUERY, "-k", 1, "-q")
    assert f"{plain.scores[0, 0]:.4f}" not in out  # the tiny model has a prompt for queries


def test_a_text_is_one_printable_line_of_a_terminal(succeed, artifact, tmp_path):
    nasty = ["two\nlines\tand \x1b[31m colour", "漢字 " * 40]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, nasty)), encoding="utf-8")
    out = succeed("search", "a\nquery", "--in", path, "-m", artifact, "-q")
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_many_queries_become_a_table(search, files, tmp_path, expected, ending):
    queries = tmp_path / "queries.csv"
    queries.write_text('id,question\n1,"solar\nenergy"\n2,road\n', encoding="utf-8")
    output = tmp_path / f"results.{ending}"
    texts = ("--texts", files / "texts.jsonl", "-c", "text", "-k", 4)
    more = ("--queries", queries, "--query-column", "question")
    code, out, err = search(QUERY, *texts, *more, "-o", output)
    assert (code, err) == (0, "")
    assert "Searched 12 rows for 3 queries in " in out
    assert out.endswith(f": 12 results -> {output}\n")
    found = read(output)
    assert [int(row["query"]) for row in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert [int(row["rank"]) for row in found] == [1, 2, 3, 4] * 3
    assert [row["query_text"] for row in found[::4]] == [QUERY, "solar\nenergy", "road"]
    assert [int(row["row"]) for row in found[:4]] == expected.indices[0, :4].tolist()
    scores = np.array([row["score"] for row in found[:4]], np.float32)
    assert scores.tobytes() == expected.scores[0, :4].tobytes()
    assert [row["text"] for row in found] == [TEXTS[int(row["row"])] for row in found]


def test_a_threshold_is_strict(search, tmp_path, expected):
    output = tmp_path / "results.jsonl"
    limit = float(expected.scores[0, 2])
    search(QUERY, "-t", limit, "-o", output)
    above = int((expected.scores[0] > np.float32(limit)).sum())
    assert [row["rank"] for row in read(output)] == list(range(1, above + 1))
    code, out, _ = search(QUERY, "-t", "1")
    assert code == 0
    assert out.splitlines()[1:] == [f"{QUERY}: 0 of 12 rows", "none above the threshold"]


# what is refused


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 8), np.float32), "of dim 8, and .* dim 32; pass the --model .and --truncate-dim"),
        (np.ones((3, 32), np.int8), "holds int8 vectors, .* --dtype float16 or float32"),
        (np.ones((0, 32), np.float32), "holds no vectors"),
        (np.full((3, 32), np.nan, np.float32), "NaN or infinity, first in row 0"),
        (np.ones(32, np.float32), "not vectors of shape"),
    ],
)  # fmt: skip
def test_vectors_that_do_not_fit(succeed, reject, artifact, tmp_path, array, message):
    np.save(tmp_path / "v.npy", array)
    code = 1 if array.ndim == 1 else 2
    arguments = ["search", QUERY, "--in", tmp_path / "v.npy", "-m", artifact]
    assert re.search(message, reject(*arguments, code=code))
    if array.shape == (3, 8):
        succeed(*arguments, "--truncate-dim", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUERY,), "search requires --in"),
        (("--in", "{}/vectors.npy"), "search requires a query, or --queries FILE"),
        ((QUERY, "--in", "{}/vectors.npy", "-c", "text"), "--column requires --in FILE --vectors"),
        ((QUERY, "--in", "{}/vectors.npy", "-o", "a.txt"), "one of .csv, .tsv, .jsonl"),
        ((QUERY, "--in", "{}/vectors.npy", "--queries", "{}/q.csv"), "there is no file"),
    ],
)
def test_a_wrong_call_is_one_line(reject, files, arguments, message):
    code = 1 if "there is no" in message else 2
    assert message in reject("search", *(part.format(files) for part in arguments), code=code)


# vectors that say what made them


@pytest.fixture
def described(artifact, tmp_path):
    """Vectors of TEXTS that say what made them."""
    path = tmp_path / "described.npy"
    encode_to_file(Embedder(artifact, precision="fp32"), TEXTS, path, truncate_dim=16)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same width and tokenizer."""
    home = tmp_path_factory.mktemp("other")
    export_model(write_checkpoint(home / "c", seed=9), home / "tiny", precisions=["fp32"])
    return home / "tiny"


def test_vectors_are_searched_with_the_precision_and_width_that_made_them(
    succeed, artifact, described
):
    model = Embedder(artifact, precision="fp32")
    best = top_k(model.encode_query([QUERY], truncate_dim=16), np.load(described), 1)
    out = succeed("search", QUERY, "--in", described, "-m", artifact, "-k", 1, "-q")
    assert out.split() == ["1", f"{best.scores[0, 0]:.4f}", str(best.indices[0, 0])]


def test_vectors_of_another_model_or_width_are_refused(
    succeed, reject, caplog, artifact, other, described
):
    line = reject("search", QUERY, "--in", described, "-m", artifact, "--truncate-dim", 8)
    assert re.search(r"\b16\b.*\b8\b", line)
    line = reject("search", QUERY, "--in", described, "-m", other)
    assert f"{described} holds vectors of another model than {other} (" in line
    assert "model digest" in line
    assert line.endswith("or --any-model to search nevertheless\n")
    arguments = ("search", QUERY, "--in", described, "-m", other, "--truncate-dim", 16, "-q")
    succeed(*arguments, "--any-model")
    np.save(described, np.load(described)[::-1])  # what the description does not describe
    succeed(*arguments)
    assert "describes other vectors" in caplog.text
