"""Files of similarities: matrix, neighbours, pairs, heatmap. Rows keep the numbers of the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.tables import write_rows
from onnxsim_embed.plot import heatmap, one_line
from onnxsim_embed.similarity import compare
from onnxsim_embed.similarity.graph import SimilarityGraph
from onnxsim_embed.similarity.graph_writer import write_graph
from onnxsim_embed.similarity.memory import Estimate
from onnxsim_embed.similarity.selection import Float32, Int64

# A heatmap is dense: 2,000 rows are 16 MB of scores and already finer than a screen.
HEATMAP_ROWS = 2000


@dataclass(frozen=True)
class SimilarityJob:
    """The vectors to compare, and their texts if known.

    :param vectors: (n, dim).
    :param texts: texts of all rows of the input.
    :param kept: int64 array (n,), the row of each vector in the input; None for all rows.
    :param rows: rows of the input.
    :param max_memory: maximum bytes to use; None for three quarters of the available memory.
    """

    vectors: npt.NDArray[Any]
    texts: list[str] | None
    kept: Int64 | None
    rows: int
    max_memory: int | None = None
    show_progress_bar: bool = False

    def estimate(self, threshold: float, k: int | None) -> Estimate:
        """Estimate the matrix above a threshold, or the top-k of each row, from a sample."""
        return compare.estimate_similarity(self.vectors, threshold, k=k)

    def write_matrix(self, path: Path, threshold: float) -> int:
        """Write the sparse matrix (rows x rows of the input) as .npz; return its number of entries."""
        matrix = compare.similarity_matrix(self.vectors, threshold, **self._options())
        if self.kept is not None:
            entries = matrix.tocoo()
            row, column = (self._rows(index).astype(index.dtype) for index in entries.coords)
            matrix = sparse.csr_array((entries.data, (row, column)), shape=(self.rows, self.rows))
        with atomic_file(path) as work, work.open("wb") as stream:
            sparse.save_npz(stream, matrix, compressed=False)
        return int(matrix.nnz)

    def write_graph(
        self, path: Path, threshold: float, k: int | None, force: bool
    ) -> SimilarityGraph:
        """Write a similarity graph: the top-k of each row, or without k all scores above a threshold."""
        limits: dict[str, Any] = {"threshold": threshold} if k is None else {"k": k}
        return write_graph(self.vectors, path, **limits, force=force, **self._options())

    def write_neighbours(self, path: Path, k: int) -> None:
        """Write row, rank, neighbour and score of the k nearest neighbours of each row."""
        top = compare.neighbours(self.vectors, k, **self._options())
        columns: dict[str, Any] = {
            "row": np.repeat(self._rows(np.arange(len(self.vectors))), k),
            "rank": np.tile(np.arange(1, k + 1), len(self.vectors)),
            "neighbour": self._rows(top.indices.ravel()),
            "score": digits(top.scores.ravel()),
        }
        write_rows(self._with_texts(columns, "row", "neighbour"), path)

    def write_pairs(self, path: Path, threshold: float) -> int:
        """Write left, right and score of each pair above a threshold; return their number."""
        pairs = compare.similar_pairs(self.vectors, threshold, **self._options())
        columns: dict[str, Any] = {
            "left": self._rows(pairs.left),
            "right": self._rows(pairs.right),
            "score": digits(pairs.scores),
        }
        write_rows(self._with_texts(columns, "left", "right"), path)
        return len(pairs.scores)

    def draw(self, path: Path) -> None:
        """Draw all scores as a heatmap; raise ValueError if there are too many rows."""
        if len(self.vectors) > HEATMAP_ROWS:
            raise ValueError(
                f"a heatmap takes at most {HEATMAP_ROWS:,} rows, got {len(self.vectors):,}; "
                "draw a part of them"
            )
        rows = self._rows(np.arange(len(self.vectors)))
        labels = None if self.texts is None else [self.texts[row] for row in rows]
        heatmap(compare.cos_sim(self.vectors, self.vectors), path, labels=labels)

    def closest(self, count: int) -> Iterator[str]:
        """Yield a line for each of the `count` closest pairs."""
        if not count:
            return
        pairs = compare.closest_pairs(self.vectors, count, max_memory=self.max_memory)
        for left, right, score in zip(*pairs, strict=True):
            a, b = (self._name(int(self._rows(row))) for row in (left, right))
            yield f"{score:.4f}  {a}  ~  {b}"

    def _options(self) -> dict[str, Any]:
        return {"max_memory": self.max_memory, "show_progress_bar": self.show_progress_bar}

    def _rows(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return rows if self.kept is None else self.kept[rows]

    def _name(self, row: int) -> str:
        return f"row {row}" if self.texts is None else f"{row}: {shorten(self.texts[row])}"

    def _with_texts(self, columns: dict[str, Any], left: str, right: str) -> dict[str, Any]:
        if self.texts is not None:
            for name in (left, right):
                columns[f"{name}_text"] = [self.texts[row] for row in columns[name]]
        return columns


def digits(scores: Float32) -> list[str]:
    """Format float32 scores with as few digits as read back to the same value."""
    return [np.format_float_positional(score, trim="0") for score in scores]


def shorten(text: str) -> str:
    """Return a text as one printable line of at most 60 characters."""
    text = one_line(text)
    return text if len(text) <= 60 else f"{text[:59]}…"
