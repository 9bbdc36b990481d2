"""Unit rows of vectors, wherever these are, as tiles in the object store."""

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
from onnxsim_embed.ray.connection import LOADER_SHARE, cluster_cpus
from onnxsim_embed.similarity.graph_writer import digest
from onnxsim_embed.similarity.unit_rows import TiledRows, UnitRows, check_vectors, unit_vectors

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VectorSource:
    """Vectors to compare; `path` is that of a .npy file."""

    vectors: VectorDirectory | npt.NDArray[Any]
    path: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number and dimension of the vectors."""
        vectors = self.vectors
        if isinstance(vectors, VectorDirectory):
            return vectors.rows, vectors.dim
        return len(vectors), vectors.shape[1]

    def digest(self) -> str:
        """Return a digest of the vectors."""
        vectors = self.vectors
        return vectors.digest if isinstance(vectors, VectorDirectory) else digest(vectors)

    def tiles(self, tile_rows: int) -> list[Any]:
        """Return references to the unit rows of each tile."""
        import ray

        starts = range(0, self.shape[0], tile_rows)
        if self.path is None and not isinstance(self.vectors, VectorDirectory):
            slices = ((start, self.vectors[start : start + tile_rows]) for start in starts)
            return [ray.put(unit_vectors(rows, first_row=start)) for start, rows in slices]
        # With so small a share, a tile that was lost with a node is loaded again even while tasks that wait
        # for it occupy all processors.
        load = ray.remote(num_cpus=LOADER_SHARE, max_retries=-1)(_load)
        source = ray.put(self.path or self.vectors)
        parallel = max(1, int(sum(cluster_cpus())))
        tiles: list[Any] = []
        loading: list[Any] = []
        for start in starts:
            if len(loading) == parallel:  # as each loads in a process of its own
                _, loading = ray.wait(loading, fetch_local=False)
            tiles.append(load.remote(source, start, min(start + tile_rows, self.shape[0])))
            loading.append(tiles[-1])
        return tiles


def open_source(vectors: npt.ArrayLike | str | Path) -> VectorSource:
    """Return the vectors of an array, a .npy file or a directory of shards.

    :raises FileNotFoundError: if there is no such file or directory.
    :raises ValueError: for an invalid array, or another kind of file.
    """
    if not isinstance(vectors, (str, Path)):
        array = np.asarray(vectors)
        check_vectors(array)
        return VectorSource(array)
    if is_uri(vectors) or is_vector_directory(vectors):
        return VectorSource(open_vectors(vectors))
    path = Path(vectors)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or directory {path}")
    if path.suffix != ".npy":
        raise ValueError(
            f"{path}: expected a directory that onnxsim_embed.ray.encode_files wrote (encode --engine ray), "
            "or a .npy file"
        )
    return VectorSource(read_vectors(path), absolute(path))


def _load(source: str | VectorDirectory, start: int, stop: int) -> Float32:
    """Return the unit rows of a tile."""
    if isinstance(source, VectorDirectory):
        rows: npt.NDArray[Any] = source.read(start, stop)
    else:
        rows = read_vectors(source)[start:stop]
    return unit_vectors(rows, first_row=start)


def diagonal_of(tile: Float32, threshold: float) -> Float32:
    """Return each row's score with itself, NaN if it does not exceed the threshold."""
    return UnitRows(tile).diagonal(threshold)


class ObjectStoreRows(TiledRows):
    """Unit rows in the object store, by a reference to each tile."""

    def __init__(self, tiles: Sequence[Any], tile_rows: int, shape: tuple[int, int]) -> None:
        super().__init__(*shape, tile_rows)
        self._tiles = tiles

    def load(self, rows: slice) -> Float32:
        """Return a tile, float32 (rows, dim), without a copy if it is on this node."""
        import ray

        tile: Float32 = ray.get(self._tiles[rows.start // self.tile_rows])
        return tile
