"""Files of similarities: matrix, neighbours, pairs, heatmap. Rows keep the names of the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from onnxsim_embed import plot
from onnxsim_embed.cli.output import counted, resumable
from onnxsim_embed.files.atomic import atomic_file
from onnxsim_embed.files.tables import write_rows
from onnxsim_embed.plot import one_line
from onnxsim_embed.similarity import compare
from onnxsim_embed.similarity.graph_writer import GraphCheckpoint, write_graph
from onnxsim_embed.similarity.selection import Pairs
from onnxsim_embed.system.arrays import Float32, Int64

if TYPE_CHECKING:
    from onnxsim_embed.cli.inputs import Rows, VectorInputs

# A heatmap is dense: 2,000 rows are 16 MB of scores and already finer than a screen.
HEATMAP_ROWS = 2000


class SimilarityJob:
    """The rows to compare; scores that several outputs need are computed once.

    :param threshold: scores above it are in matrix and pairs.
    """

    def __init__(
        self, rows: Rows, inputs: VectorInputs, threshold: float, max_memory: int | None
    ) -> None:
        self.vectors, self.texts, self.names, source = rows
        self.inputs, self.threshold = inputs, threshold
        skipped = source.report.skipped
        # Rows of the input, and which of them the vectors are.
        self.rows = len(self.vectors) + len(skipped)
        self.numbers = np.array(source.rows) if skipped else np.arange(self.rows)
        self.options: dict[str, Any] = {
            "max_memory": max_memory,
            "show_progress_bar": inputs.show_progress_bar,
        }

    def drop_duplicates(self) -> int:
        """Keep the first of equal texts, or else of equal vectors; return how many rows are dropped."""
        first: dict[str | bytes, int] = {}
        keys: Iterable[str | bytes] = map(bytes, self.vectors) if self.texts is None else self.texts
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        dropped = len(self.vectors) - len(first)
        kept = np.array(list(first.values()), np.int64)
        self.vectors, self.numbers = self.vectors[kept], self.numbers[kept]
        self.names = [self.names[row] for row in kept]
        if self.texts is not None:
            self.texts = list(dict.fromkeys(self.texts))
        return dropped

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """The scores above the threshold (n, n)."""
        return compare.similarity_matrix(self.vectors, self.threshold, **self.options)

    @cached_property
    def pairs(self) -> Pairs:
        """Each pair above the threshold, in descending order of score."""
        if "matrix" in vars(self):
            return compare.sorted_pairs(sparse.triu(self.matrix, 1, "csr"))
        return compare.similar_pairs(self.vectors, self.threshold, **self.options)

    def write_matrix(self, path: Path) -> str:
        """Write the sparse matrix (rows x rows of the input) as .npz. Like the next, return what is written."""
        matrix = self.matrix
        if len(self.numbers) < self.rows:
            entries = matrix.tocoo()
            row, column = (self.numbers[index].astype(index.dtype) for index in entries.coords)
            matrix = sparse.csr_array((entries.data, (row, column)), shape=(self.rows, self.rows))
        with atomic_file(path) as work, work.open("wb") as stream:
            sparse.save_npz(stream, matrix, compressed=False)
        return f"{counted(matrix.nnz, 'score')} above {self.threshold} -> {path}"

    def write_graph(self, path: Path, k: int | None) -> str:
        """Write a similarity graph: the top-k of each row, or without k all scores above a threshold."""
        limits: dict[str, Any] = {"threshold": self.threshold} if k is None else {"k": k}
        force = self.inputs.force

        def kept() -> str:
            shards = len(list(GraphCheckpoint(path).shards.glob("part-*.npz")))
            return counted(shards, "shard") if shards else ""

        with resumable(kept, force):
            graph = write_graph(self.vectors, path, **limits, force=force, **self.options)
        what = f" above {self.threshold}" if k is None else f", top {k} of each row"
        shards = counted(len(graph.parts), "shard")
        return f"{counted(graph.nnz, 'score')}{what} in {shards} -> {path}"

    def write_neighbours(self, path: Path, k: int) -> str:
        """Write row, rank, neighbour and score of the k nearest neighbours of each row."""
        top = compare.neighbours(self.vectors, k, **self.options)
        rows = {"row": np.repeat(np.arange(len(self.vectors)), k), "neighbour": top.indices.ravel()}
        rank = np.tile(np.arange(1, k + 1), len(self.vectors))
        names = self._names(rows)
        columns = {"row": names["row"], "rank": rank, "neighbour": names["neighbour"]}
        write_rows(columns | {"score": digits(top.scores.ravel())} | self._texts(rows), path)
        return f"{counted(k, 'neighbour')} of each row -> {path}"

    def write_pairs(self, path: Path) -> str:
        """Write left, right and score of each pair above the threshold."""
        rows = {"left": self.pairs.left, "right": self.pairs.right}
        scores = {"score": digits(self.pairs.scores)}
        write_rows(self._names(rows) | scores | self._texts(rows), path)
        return f"{counted(len(self.pairs.scores), 'pair')} above {self.threshold} -> {path}"

    def draw(self, path: Path) -> str:
        """Draw all scores as a heatmap."""
        draw_heatmap(self.vectors, self.texts, self.names, path)
        return f"heatmap -> {path}"

    def closest(self, count: int) -> Iterator[str]:
        """Yield a line for each of the `count` closest pairs."""
        if not count:
            return
        pairs = self.pairs if "pairs" in vars(self) else None
        if pairs is None or len(pairs.scores) < count:
            pairs = compare.closest_pairs(
                self.vectors, count, max_memory=self.options["max_memory"]
            )
        for left, right, score in islice(zip(*pairs, strict=True), count):
            yield f"{score:.4f}  {self._describe(left)}  ~  {self._describe(right)}"

    def _names(self, rows: dict[str, Int64]) -> dict[str, Any]:
        return {title: [self.names[row] for row in column] for title, column in rows.items()}

    def _texts(self, rows: dict[str, Int64]) -> dict[str, Any]:
        if self.texts is None or self.inputs.no_text:
            return {}
        texts = self.texts
        return {f"{title}_text": [texts[row] for row in column] for title, column in rows.items()}

    def _describe(self, row: int) -> str:
        name = self.names[row]
        return f"row {name}" if self.texts is None else f"{name}: {shorten(self.texts[row])}"


def check_heatmap(rows: Sized) -> None:
    """Raise ValueError for more rows than a heatmap may have."""
    if len(rows) > HEATMAP_ROWS:
        raise ValueError(
            f"a heatmap has at most {HEATMAP_ROWS:,} rows; draw the first: onnxsim-embed heatmap "
            f"--limit {HEATMAP_ROWS}"
        )


def draw_heatmap(
    vectors: npt.NDArray[Any],
    texts: list[str] | None,
    names: Sequence[Any],
    path: Path,
    **options: Any,  # noqa: ANN401
) -> None:
    """Draw the scores of all rows with their texts, or else their names, as labels."""
    check_heatmap(vectors)
    labels = list(map(str, names)) if texts is None else texts
    plot.heatmap(compare.cos_sim(vectors, vectors), path, labels=labels, **options)


def digits(scores: Float32) -> list[str]:
    """Format float32 scores with as few digits as read back to the same value."""
    return [np.format_float_positional(score, trim="0") for score in scores]


def shorten(text: str) -> str:
    """Return a text as one printable line of at most 60 characters."""
    text = one_line(text)
    return text if len(text) <= 60 else f"{text[:59]}…"
