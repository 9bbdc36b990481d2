"""Sets of vectors and plain float64 computations that tests of similarities share."""

from __future__ import annotations

import numpy as np

from onnxsim_embed.similarity.unit_rows import COMPONENT_BYTES, UnitRows

ROWS, DIM = 83, 24
NEAR = 1e-6  # float32 may fall on either side of a threshold that is this close


def random_vectors(rows=ROWS, dim=DIM, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def clustered_vectors(rows=ROWS, seed=1, centres=6, spread=0.2):
    """Clusters of any norm, with exact duplicates and zero rows."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((centres, DIM))[rng.integers(0, centres, rows)]
    vectors += rng.standard_normal((rows, DIM)) * spread
    vectors *= rng.uniform(0.1, 10, (rows, 1))
    if rows > 20:
        vectors[[7, 20]] = vectors[3]
        vectors[[5, rows - 1]] = 0
    return vectors.astype(np.float32)


def crossing_vectors(rows=60):
    """Ones and zeros in four components: scores are exactly 0, 0.5 or 1, with many ties."""
    masks = np.random.default_rng(2).choice([0, 1, 2, 4, 8, 15], rows)
    return ((masks[:, None] >> np.arange(4)) & 1).astype(np.float32)


SETS = {
    "random": random_vectors(),
    "clustered": clustered_vectors(),
    "crossing": crossing_vectors(40),
}


def dense(a, b=None):
    """All cosines in float64, rounded so that equal scores are equal; a zero row scores 0."""
    left, right = (np.asarray(x, np.float64) for x in (a, a if b is None else b))
    left, right = (
        x / np.where((norm := np.linalg.norm(x, axis=1, keepdims=True)) > 0, norm, 1)
        for x in (left, right)
    )
    return np.round(left @ right.T, 12)


def stored(matrix):
    """Which entries a sparse matrix holds, including zeros."""
    held = np.zeros(matrix.shape, bool)
    entries = matrix.tocoo()
    held[entries.row, entries.col] = True
    return held


def assert_same(ours, theirs):
    """Assert that matrices, or tuples of arrays, are bitwise equal."""
    if hasattr(ours, "indptr"):
        assert ours.shape == theirs.shape
        ours, theirs = ((x.data, x.indices, x.indptr) for x in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def tiled(vectors, rows):
    """Unit rows with memory for two tiles of so many rows."""
    return UnitRows(vectors, 2 * rows * COMPONENT_BYTES * max(1, vectors.shape[1]))


def as_format(vectors, dtype):
    """Vectors in a number format; scaled to -100 to 100, or 0 to 200, in integers."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        return vectors.astype(dtype)
    return (np.rint(vectors * 100 / np.abs(vectors).max()) + 100 * (kind == "u")).astype(dtype)


def on_disk(vectors, path):
    np.save(path, vectors)
    return np.load(path, mmap_mode="r")
