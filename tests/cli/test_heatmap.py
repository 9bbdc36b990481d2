"""heatmap: pictures from texts and from vectors, and one line for what cannot be drawn."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from support import TEXTS

from onnxsim_embed import Embedder, cos_sim, plot
from onnxsim_embed.cli import graph_files
from onnxsim_embed.cli.texts import Texts

PNG = b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch):
    """Record what is drawn, and draw it."""
    seen = {}
    draw = plot.heatmap

    def record(scores, path, **options):
        seen.update(options, scores=scores)
        draw(scores, path, **options)

    monkeypatch.setattr(plot, "heatmap", record)
    return seen


@pytest.fixture
def vectors(tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((9, 4)))
    return tmp_path / "v.npy"


def test_texts_are_encoded_and_label_the_rows(succeed, artifact, texts_csv, tmp_path, drawn):
    output = tmp_path / "map.png"
    title = "costs $5"
    out = succeed(
        "heatmap", texts_csv, "-o", output, "-c", "text", "-m", artifact, "--title", title
    )
    assert out.splitlines()[-1] == f"Drew {len(TEXTS)} rows -> {output}"
    assert output.read_bytes().startswith(PNG)
    encoded = Embedder(artifact).encode(TEXTS)
    np.testing.assert_array_equal(drawn["scores"], cos_sim(encoded, encoded))
    assert (drawn["labels"], drawn["title"], drawn["order"]) == (TEXTS, title, False)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_vectors_with_and_without_texts(run, succeed, tmp_path, vectors, drawn, ending):
    output = tmp_path / f"map.{ending}"
    assert run("heatmap", vectors, "-o", output, "-q") == (0, "", "")
    assert output.stat().st_size > 1000
    assert drawn["labels"] == [str(row) for row in range(9)]
    (tmp_path / "t.txt").write_text("".join(f"text {row}\n" for row in range(9)), encoding="utf-8")
    options = ["-o", output, "-n", 4, "--force", "--order"]
    for joined in (
        [tmp_path / "t.txt", "--vectors", vectors],
        [vectors, "--texts", tmp_path / "t.txt"],
    ):
        succeed("heatmap", *joined, *options)
        assert drawn["labels"] == [f"text {row}" for row in range(4)]
        assert (drawn["scores"].shape, drawn["order"]) == ((4, 4), True)


@pytest.mark.parametrize("kind", ["vectors", "texts"])
def test_too_many_rows_name_the_limit(
    reject, succeed, artifact, vectors, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(graph_files, "HEATMAP_ROWS", 5)
    file = vectors
    if kind == "texts":
        file = tmp_path / "t.txt"
        file.write_text("word\n" * 9, encoding="utf-8")
    line = reject("heatmap", file, "-o", tmp_path / "m.png", "-m", artifact)
    assert "at most 5 rows; draw the first: onnxsim-embed heatmap --limit 5" in line
    outputs = ["--heatmap", tmp_path / "m.png", "-o", tmp_path / "m.npz"]
    monkeypatch.setattr(Texts, "encode", lambda *_: pytest.fail("texts are encoded before"))
    assert "at most 5 rows" in reject("similarity", file, "-m", artifact, *outputs)
    assert not list(tmp_path.glob("m.*"))
    if kind == "vectors":
        assert "scores" in succeed("similarity", vectors, *outputs, "--estimate")


def test_what_cannot_be_drawn_is_one_line(reject, vectors, tmp_path, monkeypatch):
    texts, output = tmp_path / "t.txt", tmp_path / "m.png"
    texts.write_text("one\ntwo\n", encoding="utf-8")
    assert "holds 9 vectors for 2 rows of" in reject("heatmap", vectors, "-o", output, "--texts", texts)  # fmt: skip
    assert "--texts requires a file of vectors" in reject(
        "heatmap", texts, "-o", output, "--texts", texts
    )
    assert "pictures can be" in reject("heatmap", vectors, "-o", tmp_path / "m.xyz")
    np.save(tmp_path / "empty.npy", np.zeros((0, 4)))
    assert "holds no rows" in reject("heatmap", tmp_path / "empty.npy", "-o", output)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "[plot]'" in reject("heatmap", tmp_path / "none.csv", "-o", output, code=1)
        assert "[plot]'" in reject("similarity", "none.csv", "--heatmap", output, code=1)
    output.write_bytes(b"mine")
    assert "--force" in reject("heatmap", vectors, "-o", output)
    assert output.read_bytes() == b"mine"


def test_labels_in_any_script(succeed, artifact, tmp_path):
    labels = ["costs $5_{", "two\nlines", "漢字" * 30, "", "🙂", "עברית"]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, labels)), encoding="utf-8")
    succeed("heatmap", path, "-o", tmp_path / "m.png", "-m", artifact, "--order")
