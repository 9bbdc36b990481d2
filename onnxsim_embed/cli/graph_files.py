"""Similarities -> files: matrix, neighbours, pairs, heatmap. Rows keep the numbers of the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.texts import write_rows
from onnxsim_embed.similarity.compare import (
    closest_pairs,
    cos_sim,
    estimate_similarity,
    neighbours,
    similar_pairs,
    similarity_matrix,
)
from onnxsim_embed.similarity.graph import SimilarityGraph
from onnxsim_embed.similarity.graph_writer import write_graph
from onnxsim_embed.similarity.memory import Estimate

# A heatmap is dense: 2,000 rows are 16 MB of scores and already finer than a screen.
HEATMAP_ROWS = 2000


@dataclass(frozen=True)
class SimilarityJob:
    """The vectors to compare, and what the caller knows of them.

    :param vectors: (n, dim).
    :param texts: the texts of all rows, where they are known.
    :param kept: int64 array (n,), the row of each vector in the input, or None for all rows.
    :param rows: rows of the input.
    :param max_memory: most bytes to use; None for three quarters of what is free.
    """

    vectors: npt.NDArray[Any]
    texts: list[str] | None
    kept: npt.NDArray[np.int64] | None
    rows: int
    max_memory: int | None = None
    show_progress_bar: bool = False

    def estimate(self, threshold: float, k: int | None) -> Estimate:
        """Return what the matrix, or the k best of each row, would take, from a sample."""
        return estimate_similarity(self.vectors, threshold, k=k)

    def write_matrix(self, path: Path, threshold: float) -> int:
        """Write the sparse matrix (rows x rows of the input) as .npz; return its number of entries."""
        matrix = similarity_matrix(self.vectors, threshold, **self._options())
        if self.kept is not None:
            entries = matrix.tocoo()
            row, column = (self._rows(part.astype(np.int64)) for part in entries.coords)
            matrix = sparse.csr_array((entries.data, (row, column)), shape=(self.rows, self.rows))
        with atomic_file(path) as work, work.open("wb") as stream:
            sparse.save_npz(stream, matrix, compressed=False)
        return int(matrix.nnz)

    def write_graph(
        self, path: Path, threshold: float, k: int | None, force: bool
    ) -> SimilarityGraph:
        """Write a directory of parts: the k best of each row, or without k all scores above a threshold."""
        return write_graph(
            self.vectors,
            path,
            threshold=threshold if k is None else None,
            k=k,
            force=force,
            **self._options(),
        )

    def write_neighbours(self, path: Path, k: int) -> None:
        """Write row, rank, neighbour and score of the k closest rows of each row."""
        best = neighbours(self.vectors, k, **self._options())
        columns: dict[str, Any] = {
            "row": np.repeat(self._rows(np.arange(len(self.vectors), dtype=np.int64)), k),
            "rank": np.tile(np.arange(1, k + 1), len(self.vectors)),
            "neighbour": self._rows(best.indices.ravel()),
            "score": digits(best.scores.ravel()),
        }
        write_rows(self._with_texts(columns, "row", "neighbour"), path)

    def write_pairs(self, path: Path, threshold: float) -> int:
        """Write left, right and score of each pair above a threshold, best first; return their number."""
        pairs = similar_pairs(self.vectors, threshold, **self._options())
        columns: dict[str, Any] = {
            "left": self._rows(pairs.left),
            "right": self._rows(pairs.right),
            "score": digits(pairs.scores),
        }
        write_rows(self._with_texts(columns, "left", "right"), path)
        return len(pairs.scores)

    def draw(self, path: Path) -> None:
        """Draw all scores as a heatmap.

        :raises ValueError: if there are too many rows for a picture.
        """
        from onnxsim_embed.plot import heatmap

        if len(self.vectors) > HEATMAP_ROWS:
            raise ValueError(
                f"a heatmap takes at most {HEATMAP_ROWS:,} rows, got {len(self.vectors):,}; "
                "draw a part of them"
            )
        rows = self._rows(np.arange(len(self.vectors), dtype=np.int64))
        labels = None if self.texts is None else [self.texts[row] for row in rows]
        heatmap(cos_sim(self.vectors, self.vectors), path, labels=labels)

    def closest(self, count: int) -> Iterator[str]:
        """Yield a line for each of the `count` closest pairs."""
        pairs = closest_pairs(self.vectors, count, max_memory=self.max_memory) if count else ()
        for left, right, score in zip(*pairs, strict=True):
            a, b = self._rows(left), self._rows(right)
            yield f"{score:.4f}  {self._name(int(a))}  ~  {self._name(int(b))}"

    def _options(self) -> dict[str, Any]:
        return {"max_memory": self.max_memory, "show_progress_bar": self.show_progress_bar}

    def _rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return rows if self.kept is None else self.kept[rows]

    def _name(self, row: int) -> str:
        if self.texts is None:
            return f"row {row}"
        return f"{row}: {shorten(self.texts[row])}"

    def _with_texts(self, columns: dict[str, Any], left: str, right: str) -> dict[str, Any]:
        if self.texts is not None:
            for name in (left, right):
                columns[f"{name}_text"] = [self.texts[row] for row in columns[name]]
        return columns


def digits(scores: npt.NDArray[np.float32]) -> list[str]:
    """Write float32 scores with as many digits as read back to the same value."""
    return [np.format_float_positional(score, trim="0") for score in scores]


def shorten(text: str) -> str:
    """Return a text as one line of at most 60 characters that a terminal can show."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 60 else f"{text[:59]}…"
