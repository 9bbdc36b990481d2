"""explore: a map of all rows, opened in embedding-atlas."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typer import Argument, Option

from onnxsim_embed.cli.inputs import VectorInputs
from onnxsim_embed.cli.output import check_table, counted
from onnxsim_embed.errors import check_packages
from onnxsim_embed.files.atomic import atomic_directory, atomic_file
from onnxsim_embed.system.arrays import Float32

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsim_embed.similarity.compare import TopK

logger = logging.getLogger(__name__)
MIN_ROWS = 4  # UMAP's spectral start fails on fewer


def explore(
    inputs: VectorInputs,
    file: str = Argument(..., help="File of texts, or vectors: .npy or .parquet."),
    output: Path | None = Option(
        None, "--output", "-o", help="map.parquet to write; default: FILE's name, .map.parquet."
    ),
    k: int = Option(15, "--top-k", "-k", min=2, help="Nearest neighbours of each row."),
    threshold: float = Option(
        0.75, "--threshold", "-t", min=-1, max=1, help="Similarity within a cluster."
    ),
    min_size: int = Option(10, min=1, help="Minimum rows of a cluster."),
    export: Path | None = Option(
        None, "--export", help="Write a static page, to be served from any host, and end."
    ),
    no_open: bool = Option(False, "--no-open", help="Write the parquet file, and end."),
) -> None:
    """Draw a map of all rows, and open it in embedding-atlas.

    The parquet file holds id, text, x and y (UMAP of the exact nearest neighbours), neighbors (row
    numbers from 0, and distances: 1 - cosine) and cluster (a community, named by its central text).
    """
    if export is not None and no_open:
        raise ValueError("--export cannot be combined with --no-open")
    output = output or Path(f"{'stdin' if file == '-' else Path(file).stem}.map.parquet")
    check_table(output, inputs.force, ".parquet")
    if export is not None and export.exists() and not inputs.force:
        raise FileExistsError(f"{export} exists; replace it with --force, or choose another name")
    needed = {"umap": "umap-learn", "pyarrow": "pyarrow", "embedding_atlas": "embedding-atlas"}
    if no_open:
        del needed["embedding_atlas"]
    check_packages("drawing a map", "explore", needed)
    from pyarrow import parquet

    from onnxsim_embed.cli.graph_files import shorten
    from onnxsim_embed.similarity.clustering import communities
    from onnxsim_embed.similarity.compare import neighbours

    rows = inputs.read(file)
    vectors, size = rows.vectors, len(rows.vectors)
    if size < MIN_ROWS:
        raise ValueError(f"{file} holds {counted(size, 'row')}; a map requires {MIN_ROWS}")
    nearest = neighbours(vectors, min(k, size - 1), show_progress_bar=inputs.show_progress_bar)
    logger.info("placing %s with UMAP", counted(size, "row"))
    names = rows.names if inputs.id_column is None else map(str, rows.names)
    columns: dict[str, Any] = {"id": list(names)}
    if rows.texts is not None and not inputs.no_text:
        columns["text"] = rows.texts
    columns["x"], columns["y"] = place(vectors, nearest).T
    columns["neighbors"] = [
        {"ids": ids, "distances": distances}
        for ids, distances in zip(nearest.indices, _distances(nearest), strict=True)
    ]
    groups = communities(vectors, threshold, min_size)
    labels = columns["id"] if rows.texts is None else rows.texts
    clusters = columns["cluster"] = np.full(size, None, object)
    for number, group in enumerate(groups):
        clusters[group] = f"{number}: {shorten(str(labels[group[0]]))}"
    with atomic_file(output) as work:
        parquet.write_table(_table(columns), work)
    clustered = sum(map(len, groups))
    inputs.say(
        f"Wrote {output}: {counted(size, 'row')}, {clustered:,} of them in "
        f"{counted(len(groups), 'cluster')}."
    )
    if not no_open:
        _open_atlas(output, "text" in columns, export, inputs.say)


def _distances(nearest: TopK) -> Float32:
    """Return cosine distances, (n, k)."""
    return np.maximum(1 - nearest.scores, 0)


def place(vectors: npt.NDArray[Any], nearest: TopK) -> Float32:
    """Return positions (n, 2) by UMAP (arXiv:1802.03426) of exact neighbours: the same for the same vectors."""
    import umap

    own = np.arange(len(vectors))[:, None]
    with warnings.catch_warnings():  # of one thread, and no way to place other rows later
        warnings.simplefilter("ignore")
        projection = umap.UMAP(
            n_neighbors=nearest.indices.shape[1] + 1,  # it counts the row itself
            metric="cosine",
            random_state=0,
            n_jobs=1,
            precomputed_knn=(
                np.hstack([own, nearest.indices]),
                np.hstack([np.zeros_like(own, np.float32), _distances(nearest)]),
            ),
        )
        positions: Float32 = projection.fit_transform(np.asarray(vectors))
    return positions


def _table(columns: dict[str, Any]) -> Any:  # noqa: ANN401 - pyarrow is untyped
    import pyarrow

    pairs = pyarrow.struct(
        {"ids": pyarrow.list_(pyarrow.int64()), "distances": pyarrow.list_(pyarrow.float32())}
    )
    types = {"neighbors": pairs, "cluster": pyarrow.string()}
    return pyarrow.table(
        {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    )


def _open_atlas(
    path: Path, has_text: bool, export: Path | None, say: Callable[[str], None]
) -> None:
    """Run embedding-atlas on the map: until it is interrupted, or to export a page."""
    command = [str(path), "--x", "x", "--y", "y", "--neighbors", "neighbors"]
    if has_text:
        command += ["--text", "text"]
    say(f"Open it again: embedding-atlas {' '.join(command)}")
    run = [sys.executable, "-m", "embedding_atlas.cli", *command]
    if export is None:
        subprocess.run(run, check=True)
        return
    with atomic_directory(export) as work:
        subprocess.run(
            [*run, "--export-application", str(work)], check=True, stdout=subprocess.DEVNULL
        )
    say(f"Wrote {export}: serve it with python -m http.server -d {export}")
