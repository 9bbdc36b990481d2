"""explore, without UMAP and embedding-atlas: what is written. `make interop` runs it with both."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from pyarrow import parquet
from support import TEXTS

from onnxsim_embed import Embedder, communities, neighbours
from onnxsim_embed.cli import explore


@pytest.fixture
def placed(monkeypatch):
    """UMAP's place is taken by two coordinates of the vectors."""
    monkeypatch.setattr(explore, "check_packages", lambda *_: None)
    monkeypatch.setattr(explore, "place", lambda vectors, nearest: vectors[:, :2])


def test_a_map_holds_texts_positions_exact_neighbours_and_clusters(
    run, succeed, placed, artifact, texts_csv, tmp_path
):
    target = tmp_path / "texts.map.parquet"
    options = ["-m", artifact, "-c", "text", "--id-column", "id", "-k", 3]
    options += ["--threshold", 0.2, "--min-size", 2, "--no-open", "-o", target]
    code, out, err = run("explore", texts_csv, *options)
    assert code == 0, err
    assert str(target) in out
    table = parquet.read_table(target)
    columns = table.to_pydict()
    vectors = Embedder(artifact).encode(TEXTS)
    assert columns["id"] == list(map(str, range(len(TEXTS))))
    assert columns["text"] == TEXTS
    np.testing.assert_array_equal(columns["x"], vectors[:, 0])
    nearest = neighbours(vectors, 3)
    for row, (ids, scores) in enumerate(zip(nearest.indices, nearest.scores, strict=True)):
        found = columns["neighbors"][row]
        assert found["ids"] == ids.tolist()
        np.testing.assert_allclose(found["distances"], 1 - scores, atol=1e-6)
    for number, group in enumerate(communities(vectors, 0.2, 2)):
        assert len({columns["cluster"][row] for row in group}) == 1
        assert columns["cluster"][group[0]].startswith(f"{number}: ")
    assert run("explore", texts_csv, *options)[0] == 2  # exists
    succeed("explore", texts_csv, *options, "--force", "--no-text")
    assert "text" not in parquet.read_table(target).column_names


def test_what_cannot_be_drawn_is_said_before_any_work(reject, placed, tmp_path):
    few = tmp_path / "few.npy"
    np.save(few, np.eye(3, 8, dtype=np.float32))
    assert "3 rows" in reject("explore", few, "--no-open")
    existing = ["explore", few, "--export", tmp_path]
    assert "--force" in reject(*existing)
    assert "--no-open" in reject(*existing, "--no-open")


def test_a_missing_package_names_the_extra(reject, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "[explore]" in reject("explore", tmp_path / "x.csv", "--no-open", code=1)
