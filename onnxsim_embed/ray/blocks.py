"""Vectors, wherever they are, as blocks of rows in the object store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.files.locations import absolute
from onnxsim_embed.files.uris import is_uri
from onnxsim_embed.files.vector_directory import VectorDirectory, is_vector_directory, open_vectors
from onnxsim_embed.files.vectors import read_vectors
from onnxsim_embed.ray.connection import LOADER_SHARE, cpus_of, nodes
from onnxsim_embed.similarity.graph_writer import digest
from onnxsim_embed.similarity.unit_rows import TiledRows, UnitRows, unit_vectors

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """Vectors to compare.

    :param path: of the .npy file that holds them.
    """

    vectors: VectorDirectory | npt.NDArray[Any]
    path: str | None = None

    @property
    def rows(self) -> int:
        """How many there are."""
        found = self.vectors
        return found.rows if isinstance(found, VectorDirectory) else len(found)

    @property
    def width(self) -> int:
        """Numbers of each."""
        found = self.vectors
        return found.dim if isinstance(found, VectorDirectory) else found.shape[1]

    def digest(self) -> str:
        """Return what tells them from others."""
        found = self.vectors
        return found.digest if isinstance(found, VectorDirectory) else digest(found)

    def loads(self, height: int) -> list[Any]:
        """Return references to the unit vectors of each block."""
        import ray

        if self.path is None and not isinstance(self.vectors, VectorDirectory):
            parts = (self.vectors[s : s + height] for s in range(0, self.rows, height))
            return [
                ray.put(unit_vectors(part, first_row=n * height)) for n, part in enumerate(parts)
            ]
        # So little that it fits beside a task that waits for it, which keeps its processor: a block that was
        # lost with a node is loaded again while all processors are taken.
        load = ray.remote(num_cpus=LOADER_SHARE, max_retries=-1)(_load)
        what = ray.put(self.path or self.vectors)  # an index may be of many parts
        most = max(1, int(sum(cpus_of(nodes()))))
        blocks: list[Any] = []
        waiting: list[Any] = []
        for start in range(0, self.rows, height):
            if len(waiting) == most:  # each has a worker, of which an engine starts as many as fit
                _, waiting = ray.wait(waiting, fetch_local=False)
            blocks.append(load.remote(what, start, min(start + height, self.rows)))
            waiting.append(blocks[-1])
        return blocks


def source_of(vectors: npt.ArrayLike | str | Path) -> Source:
    """Return the vectors of an array, a .npy file or a directory.

    :raises FileNotFoundError: if there are none.
    :raises ValueError: if they are no vectors, or in a file of another kind.
    """
    if not isinstance(vectors, (str, Path)):
        array = np.asarray(vectors)
        UnitRows(array[:0])  # checks shape and dtype
        return Source(array)
    if is_uri(vectors) or is_vector_directory(vectors):
        return Source(open_vectors(vectors))
    path = Path(vectors)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or directory {path}")
    if path.suffix != ".npy":
        raise ValueError(
            f"{path}: --engine ray takes vectors from a directory that encode --engine ray wrote, or from .npy"
        )
    return Source(read_vectors(path), absolute(path))


def _load(source: str | VectorDirectory, start: int, stop: int) -> Float32:
    """Return the unit vectors of a block."""
    if isinstance(source, VectorDirectory):
        rows: npt.NDArray[Any] = source.read(start, stop)
    else:
        rows = read_vectors(source)[start:stop]
    return unit_vectors(rows, first_row=start)


def self_scores(rows: Float32, threshold: float) -> Float32:
    """Return each row's score with itself, NaN where that is not above the threshold."""
    return UnitRows(rows).diagonal(threshold)


class BlockRows(TiledRows):
    """Unit vectors in the object store.

    :param blocks: a reference to each block.
    :param height: rows of a block.
    """

    def __init__(self, blocks: Sequence[Any], height: int, rows: int, width: int) -> None:
        super().__init__(rows, width, height)
        self._blocks = blocks

    def load(self, rows: slice) -> Float32:
        """Return a block, float32 (rows, dim), without a copy where this node has it."""
        import ray

        block: Float32 = ray.get(self._blocks[rows.start // self.tile_rows])
        return block
