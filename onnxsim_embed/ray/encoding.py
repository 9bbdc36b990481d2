"""Files of texts -> a directory of vectors, on a cluster; a run that was stopped is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxsim_embed.files.locations import Directory, find_files
from onnxsim_embed.files.uris import display_name
from onnxsim_embed.files.vector_directory import JOB, RowDiagnostic, VectorDirectory
from onnxsim_embed.ray.connection import (
    Actors,
    check_shared,
    cluster,
    cpus_of,
    nodes,
    plain_errors,
    plan_actors,
    require_ray,
)
from onnxsim_embed.ray.datasets import load_model
from onnxsim_embed.ray.encoder import EncodeOptions, PackedModel
from onnxsim_embed.ray.shards import PartsJob
from onnxsim_embed.ray.texts import Columns, TextFile, group_files, survey, with_rows
from onnxsim_embed.runtime.encode_to_file import identity
from onnxsim_embed.system.progress import progress_bar

if TYPE_CHECKING:
    from onnxsim_embed.runtime.embedder import Embedder

# Rows of a part: some ten seconds of one thread, which is what a kill may cost, and 3 MB of vectors.
PART_ROWS = 2048


@dataclass(frozen=True)
class EncodedFiles:
    """What a run did.

    :param vectors: the directory.
    :param rows_found: vectors that earlier runs had made.
    :param remarks: rows without a vector, and rows with unusual texts.
    :param actors: what encoded; None where nothing was left to do.
    :param seconds: from the first part's start to the last one's end: neither the cluster's start nor the
        loading of models is in it.
    """

    vectors: VectorDirectory
    rows_found: int
    remarks: Sequence[RowDiagnostic]
    actors: Actors | None
    seconds: float


def encode_files(
    source: str | Path,
    directory: str | Path,
    model: str | Embedder = "all-MiniLM-L6-v2",
    *,
    column: str | None = None,
    id_column: str | None = None,
    kind: str | None = None,
    precision: str = "auto",
    prompt_name: str | None = None,
    prompt: str | None = None,
    max_seq_length: int | None = None,
    normalize_embeddings: bool | None = None,
    truncate_dim: int | None = None,
    on_error: str = "skip",
    part_rows: int = PART_ROWS,
    actor_threads: int | None = None,
    actors: int | None = None,
    address: str | None = None,
    force: bool = False,
    show_progress_bar: bool = False,
) -> EncodedFiles:
    """Encode files of texts into a directory of parquet parts with ids and vectors, on a Ray cluster.

    The vectors are those of `Embedder.encode`. The same call after a stop does the parts that are missing; the
    directory is whole when it holds `index.json`.

    :param source: a file, a directory, a pattern such as texts/*.jsonl, or a URI of any of them; csv, tsv,
        jsonl, parquet or txt (also .gz). Rows are taken file by file, files in the order of their names.
    :param directory: path that every node sees, or URI.
    :param model: recipe name, artifact, checkpoint, Hub id, or a model that is loaded.
    :param column: column of the texts.
    :param id_column: column of the rows' ids; None for their numbers from 0.
    :param kind: csv, tsv, jsonl, parquet or txt; None: by each file's ending.
    :param on_error: "skip" leaves out rows without a usable text, and names them in rejected.jsonl;
        "raise" stops at the first.
    :param part_rows: rows of a part.
    :param actor_threads: threads of each actor; None for the most, up to 4, that leave the fewest
        processors idle.
    :param actors: how many; None for as many as the cluster has room for.
    :param address: of a cluster; None for the one connected, RAY_ADDRESS, or a new one on this machine.
    :param force: start over, and replace what the directory holds.
    :param show_progress_bar: show one on standard error. The rest: see `Embedder.encode`.
    :raises FileNotFoundError: if there is no such file.
    :raises FileExistsError: if the directory holds something else.
    :raises ValueError: if it holds vectors of another job, naming what differs; as `Embedder.encode`.
    :raises TableError: for a damaged file; with on_error="raise" for a row without a usable text, naming it.
    :raises OnnxsimEmbedError: if a node does not see a path, or the cluster cannot be reached.

    Usage::

        done = encode_files("texts/*.csv", "vectors", column="text")
        vectors = done.vectors.read()                     # float32 (n, 384)
        graph = onnxsim_embed.ray.write_graph("vectors", "graph", threshold=0.5)
    """
    if part_rows < 1:
        raise ValueError(f"part_rows must be positive, got {part_rows}")
    require_ray()  # before the time that a model takes
    storage = Directory(directory)
    locations = find_files(source)
    _check_directory(storage, locations)
    columns = Columns(column, id_column, kind)
    embedder = load_model(model, precision)
    options = EncodeOptions(
        embedder.prompt_text(prompt_name, prompt),
        max_seq_length,
        normalize_embeddings,
        truncate_dim,
        on_error,
    )
    origin = options.apply(embedder)
    with cluster(address), plain_errors():
        check_shared(storage, locations[0])
        files, id_type = _survey(locations, columns)
        total = sum(file.rows for file in files)
        settings = {
            **identity(embedder),
            "prompt": origin.prompt,
            "max_seq_length": origin.max_seq_length,
            "normalize": origin.normalize,
            "truncate_dim": origin.truncate_dim,
            "onnxsim_embed": origin.onnxsim_embed,
            "onnxruntime": origin.onnxruntime,
            "column": column,
            "id_column": id_column,
            "part_rows": part_rows,
            "rows": total,
            "input": _digest(files),
        }
        job = PartsJob(storage, settings, group_files(files, part_rows), id_type)
        found = job.begin(force)
        plan = plan_actors(cpus_of(nodes()), actor_threads, actors) if job.missing else None
        if plan is not None:
            import ray

            packed = ray.put(PackedModel.of(embedder.artifact, embedder.precision))
            bar = progress_bar(
                desc="Encoding", unit=" texts", total=total, initial=found,
                smoothing=0.1, disable=not show_progress_bar,
            )  # fmt: skip
            with bar:
                for rows in job.run(columns, packed, options, plan):
                    bar.update(rows)
        vectors = job.finish(
            VectorDirectory(storage, origin.truncate_dim or origin.dim, (), origin)
        )
    remarks = [entry for shard in vectors.shards for entry in shard.diagnostics]
    return EncodedFiles(vectors, found, remarks, plan, job.seconds)


def _check_directory(storage: Directory, inputs: Sequence[str]) -> None:
    """Refuse a directory that holds something else than vectors of such a job, or would become an input.

    :raises FileExistsError: naming the directory.
    """
    local = storage.local
    if local is not None and local.exists() and not local.is_dir():
        raise FileExistsError(f"{local} exists and is a file; choose another name")
    if local is not None and not local.parent.is_dir():
        raise FileNotFoundError(f"cannot write {local}: there is no directory {local.parent}")
    if any(display_name(location).startswith(f"{storage}/") for location in inputs):
        raise FileExistsError(
            f"{storage} holds texts to encode; choose another directory for the vectors"
        )
    names = [name for name in storage.names() if not name.startswith(".")]
    if names and JOB not in names:
        raise FileExistsError(
            f"{storage} exists and holds no vectors of such a job; choose another directory"
        )


def _survey(locations: Sequence[str], columns: Columns) -> tuple[list[TextFile], str]:
    """Count the rows of each file, side by side; return those that have some, and the type of their ids."""
    import ray

    count = ray.remote(num_cpus=1)(survey)
    waiting = [count.remote(location, columns) for location in locations]
    return with_rows(ray.get(waiting))


def _digest(files: Sequence[TextFile]) -> str:
    """Return what tells an input from another: its files' names, rows and bytes, wherever they lie."""
    told = [
        [display_name(file.location).rpartition("/")[2], file.rows, file.digest] for file in files
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
