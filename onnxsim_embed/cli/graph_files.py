"""Files of similarities: matrix, neighbours, pairs, heatmap. Rows keep the names of the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
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
from onnxsim_embed.similarity.selection import Pairs
from onnxsim_embed.system.arrays import Float32, Int64

# A heatmap is dense: 2,000 rows are 16 MB of scores and already finer than a screen.
HEATMAP_ROWS = 2000


@dataclass
class SimilarityJob:
    """The vectors to compare; scores that several outputs need are computed once.

    :param vectors: (n, dim).
    :param names: id or row number of each vector.
    :param threshold: scores above it are in matrix and pairs.
    :param kept: int64 array (n,), the row of each vector in the input; None for all rows.
    :param rows: rows of the input.
    """

    vectors: npt.NDArray[Any]
    names: Sequence[Any]
    texts: list[str] | None
    threshold: float
    kept: Int64 | None = None
    rows: int = 0
    with_texts: bool = True
    max_memory: int | None = None
    show_progress_bar: bool = False

    def estimate(self, k: int | None) -> Estimate:
        """Estimate the matrix above the threshold, or the top-k of each row, from a sample."""
        return compare.estimate_similarity(self.vectors, self.threshold, k=k)

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """The scores above the threshold (n, n)."""
        return compare.similarity_matrix(self.vectors, self.threshold, **self._options())

    @cached_property
    def pairs(self) -> Pairs:
        """Each pair above the threshold, in descending order of score."""
        if "matrix" in vars(self):
            return compare.sorted_pairs(sparse.triu(self.matrix, 1, "csr"))
        return compare.similar_pairs(self.vectors, self.threshold, **self._options())

    def write_matrix(self, path: Path) -> int:
        """Write the sparse matrix (rows x rows of the input) as .npz; return its number of entries."""
        matrix = self.matrix
        if self.kept is not None:
            entries = matrix.tocoo()
            row, column = (self.kept[index].astype(index.dtype) for index in entries.coords)
            matrix = sparse.csr_array((entries.data, (row, column)), shape=(self.rows, self.rows))
        with atomic_file(path) as work, work.open("wb") as stream:
            sparse.save_npz(stream, matrix, compressed=False)
        return int(matrix.nnz)

    def write_graph(self, path: Path, k: int | None, force: bool) -> SimilarityGraph:
        """Write a similarity graph: the top-k of each row, or without k all scores above a threshold."""
        limits: dict[str, Any] = {"threshold": self.threshold} if k is None else {"k": k}
        return write_graph(self.vectors, path, **limits, force=force, **self._options())

    def write_neighbours(self, path: Path, k: int) -> None:
        """Write row, rank, neighbour and score of the k nearest neighbours of each row."""
        top = compare.neighbours(self.vectors, k, **self._options())
        rows = {"row": np.repeat(np.arange(len(self.vectors)), k), "neighbour": top.indices.ravel()}
        rank = np.tile(np.arange(1, k + 1), len(self.vectors))
        names = self._names(rows)
        columns = {"row": names["row"], "rank": rank, "neighbour": names["neighbour"]}
        write_rows(columns | {"score": digits(top.scores.ravel())} | self._texts(rows), path)

    def write_pairs(self, path: Path) -> int:
        """Write left, right and score of each pair above the threshold; return their number."""
        rows = {"left": self.pairs.left, "right": self.pairs.right}
        scores = {"score": digits(self.pairs.scores)}
        write_rows(self._names(rows) | scores | self._texts(rows), path)
        return len(self.pairs.scores)

    def draw(self, path: Path) -> None:
        """Draw all scores as a heatmap; raise ValueError if there are too many rows."""
        if len(self.vectors) > HEATMAP_ROWS:
            raise ValueError(
                f"a heatmap takes at most {HEATMAP_ROWS:,} rows, got {len(self.vectors):,}; "
                "draw a part of them"
            )
        labels = list(map(str, self.names)) if self.texts is None else self.texts
        heatmap(compare.cos_sim(self.vectors, self.vectors), path, labels=labels)

    def closest(self, count: int) -> Iterator[str]:
        """Yield a line for each of the `count` closest pairs."""
        if not count:
            return
        pairs = self.pairs if "pairs" in vars(self) else None
        if pairs is None or len(pairs.scores) < count:
            pairs = compare.closest_pairs(self.vectors, count, max_memory=self.max_memory)
        for left, right, score in islice(zip(*pairs, strict=True), count):
            yield f"{score:.4f}  {self._describe(left)}  ~  {self._describe(right)}"

    def _options(self) -> dict[str, Any]:
        return {"max_memory": self.max_memory, "show_progress_bar": self.show_progress_bar}

    def _names(self, rows: dict[str, Int64]) -> dict[str, Any]:
        return {title: [self.names[row] for row in column] for title, column in rows.items()}

    def _texts(self, rows: dict[str, Int64]) -> dict[str, Any]:
        if self.texts is None or not self.with_texts:
            return {}
        texts = self.texts
        return {f"{title}_text": [texts[row] for row in column] for title, column in rows.items()}

    def _describe(self, row: int) -> str:
        name = self.names[row]
        return f"row {name}" if self.texts is None else f"{name}: {shorten(self.texts[row])}"


def digits(scores: Float32) -> list[str]:
    """Format float32 scores with as few digits as read back to the same value."""
    return [np.format_float_positional(score, trim="0") for score in scores]


def shorten(text: str) -> str:
    """Return a text as one printable line of at most 60 characters."""
    text = one_line(text)
    return text if len(text) <= 60 else f"{text[:59]}…"
