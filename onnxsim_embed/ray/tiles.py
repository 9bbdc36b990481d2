"""Unit rows of vectors, wherever these are, as tiles in the object store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from onnxsim_embed.similarity.unit_rows import TiledRows, check_vectors, unit_vectors
from onnxsim_embed.system.arrays import Float32


@dataclass(frozen=True)
class VectorSource:
    """Vectors to compare: an array, a directory of shards, or the path of a .npy file."""

    vectors: npt.NDArray[Any] | VectorDirectory | str
    shape: tuple[int, int]
    digest: Callable[[], str]

    def tiles(self, tile_rows: int) -> list[Any]:
        """Return references to the unit rows of each tile."""
        import ray

        # With so small a share, a tile that was lost with a node is loaded again even while tasks that wait
        # for it occupy all processors.
        load = ray.remote(num_cpus=LOADER_SHARE, max_retries=-1)(_load)
        vectors = ray.put(self.vectors)
        parallel = max(1, int(sum(cluster_cpus())))
        tiles: list[Any] = []
        loading: list[Any] = []
        for start in range(0, self.shape[0], tile_rows):
            if len(loading) == parallel:  # as each loads in a process of its own
                _, loading = ray.wait(loading, fetch_local=False)
            tiles.append(load.remote(vectors, start, start + tile_rows))
            loading.append(tiles[-1])
        return tiles


def open_source(vectors: npt.ArrayLike | str | Path) -> VectorSource:
    """Return the vectors of an array, a .npy file or a directory of shards.

    :raises FileNotFoundError: if there is no such file or directory.
    :raises ValueError: for an invalid array, or another kind of file.
    """
    if isinstance(vectors, (str, Path)) and (is_uri(vectors) or is_vector_directory(vectors)):
        stored = open_vectors(vectors)
        return VectorSource(stored, (stored.rows, stored.dim), lambda: stored.digest)
    source: str | npt.NDArray[Any] = absolute(vectors) if isinstance(vectors, (str, Path)) else np.asarray(vectors)  # fmt: skip
    if isinstance(source, str) and Path(source).exists() and not source.endswith(".npy"):
        raise ValueError(
            f"{source}: expected a directory that onnxsim_embed.ray.encode_files wrote, or a .npy file"
        )
    array = read_vectors(source) if isinstance(source, str) else source
    check_vectors(array)
    return VectorSource(source, (len(array), array.shape[1]), lambda: digest(array))


def _load(vectors: npt.NDArray[Any] | VectorDirectory | str, start: int, stop: int) -> Float32:
    """Return the unit rows of a tile."""
    if isinstance(vectors, VectorDirectory):
        rows: npt.NDArray[Any] = vectors.read(start, min(stop, vectors.rows))
    else:
        rows = (read_vectors(vectors) if isinstance(vectors, str) else vectors)[start:stop]
    return unit_vectors(rows, first_row=start)


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
