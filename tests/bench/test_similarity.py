"""The whole measurement of similarities, small: exact, and every figure there."""

from __future__ import annotations

import numpy as np
import pytest
from lab import report, similarity_bench
from lab.peers import Environments
from lab.similarity_bench import SimilarityBench, SimilarityPlan, tiled

from onnxsim_embed import similarity_matrix
from onnxsim_embed.similarity.compare import unit_vectors

VECTORS = np.random.default_rng(1).standard_normal((90, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One round of ours and of a peer that is not there."""
    directory = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity_bench, "SIZES", (40,))
        plan = SimilarityPlan(
            vectors=VECTORS, source="a test", peers=("sparse-dot-topn",), threads=2, rounds=1,
            work=directory, k=3, large=200, patience=0, roof_seconds=0.01,
        )  # fmt: skip
        environments = Environments(None, None, lambda _: None)
        return SimilarityBench(plan, environments, lambda _: None).run()


def test_both_tasks_are_measured_at_every_size_and_are_exact(result):
    assert list(result["systems"]) == ["ours", "ours-float32"]
    for row in result["systems"].values():
        for task in ("above", "best"):
            assert list(row[task]) == ["40", "90"]
            assert [cell["wrong"] for cell in row[task].values()] == [0, 0]
            assert row[task]["90"]["largest_error"] < 1e-6
            assert row[task]["90"]["above_input_and_output_mb"] >= 0
        assert row["above"]["90"]["entries"] == similarity_matrix(VECTORS, 0.5).nnz
        assert row["best"]["90"]["entries"] == 90 * 3


def test_the_large_case_is_set_against_the_small_one(result):
    large = result["large"]
    assert (large["rows"], large["rows_base"]) == (200, 90)
    expected = large["seconds"] / 200**2 / (large["seconds_base"] / 90**2)
    assert large["cost_per_pair_to_base"] == pytest.approx(expected, rel=1e-4)


def test_it_becomes_tables_and_a_picture(result, tmp_path):
    assert result["failed"] == {"sparse-dot-topn": "not installed: sparse-dot-topn"}
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- bench:similarity -->\nstale\n<!-- /bench:similarity -->\nb\n")
    report.write_json(tmp_path / "similarity.json", result)
    report.write_report(tmp_path, [document], print)
    assert (tmp_path / "growth.png").stat().st_size > 1000
    text = document.read_text()
    assert "stale" not in text
    assert "90 rows, above 0.5" in text
    assert "The 3 best of each of 200 rows" in text
    assert text.endswith("<!-- /bench:similarity -->\nb\n")


def test_tiled_rows_are_near_their_originals_and_differ():
    unit = unit_vectors(VECTORS)
    rows = tiled(unit, 200)
    assert rows.shape == (200, 8)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    originals = unit[np.arange(200) % 90]
    assert np.einsum("ij,ij->i", rows, originals).min() > 0.99
    assert len(np.unique(rows, axis=0)) == 200
