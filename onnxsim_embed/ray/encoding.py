"""Encode text files into a directory of vectors on a Ray cluster, resumable."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxsim_embed.files.locations import Directory, find_files
from onnxsim_embed.files.texts import ReadReport
from onnxsim_embed.files.uris import display_name
from onnxsim_embed.files.vector_directory import JOB, RowDiagnostic, VectorDirectory
from onnxsim_embed.ray import connection
from onnxsim_embed.ray.encoder import PackedModel, prepare_model
from onnxsim_embed.ray.shards import ShardCheckpoint, encode_shards
from onnxsim_embed.ray.tasks import plain_errors
from onnxsim_embed.ray.texts import Columns, group_files, repeated_ids, survey, with_rows
from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.options import LongTexts
from onnxsim_embed.runtime.provenance import model_settings
from onnxsim_embed.system.progress import progress_bar
from onnxsim_embed.system.units import check_integer

logger = logging.getLogger(__name__)

# Rows of a shard: some ten seconds of one thread, the work that a kill may lose, and 3 MB of vectors.
SHARD_ROWS = 2048

# What of the provenance the shards of one directory share, beside the model.
SETTINGS = (
    "prompt", "max_seq_length", "normalize", "truncate_dim", "long_texts", "onnxsim_embed", "onnxruntime",
)  # fmt: skip


@dataclass(frozen=True)
class EncodedFiles:
    """What a call of `encode_files` did.

    :param vectors: the directory.
    :param rows_found: input rows that earlier, interrupted calls had finished.
    :param remarks: diagnostics of rows without a vector, and of rows with unusual texts.
    :param actors: the actors that encoded; None if nothing was left to encode.
    :param seconds: from the start of the first shard to the end of the last one, without the start of the
        cluster and the loading of models.
    :param reports: the columns that were read of each file, and what was found in it.
    """

    vectors: VectorDirectory
    rows_found: int
    remarks: Sequence[RowDiagnostic]
    actors: connection.Actors | None
    seconds: float
    reports: Mapping[str, ReadReport] = field(default_factory=dict)


def encode_files(
    source: str | Path,
    directory: str | Path,
    model: str | Embedder = "all-MiniLM-L6-v2",
    *,
    column: str | None = None,
    id_column: str | None = None,
    kind: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    precision: str = "auto",
    prompt_name: str | None = None,
    prompt: str | None = None,
    max_seq_length: int | None = None,
    normalize_embeddings: bool | None = None,
    truncate_dim: int | None = None,
    long_texts: LongTexts = "truncate",
    stride: int = 0,
    on_error: str = "skip",
    part_rows: int = SHARD_ROWS,
    actor_threads: int | None = None,
    actors: int | None = None,
    address: str | None = None,
    force: bool = False,
    show_progress_bar: bool = False,
) -> EncodedFiles:
    """Encode text files into a directory of parquet shards with ids and vectors, on a Ray cluster.

    The vectors are those of `Embedder.encode`. After an interruption the same call encodes the missing shards;
    the directory is complete when it holds `index.json`.

    :param source: a file, a directory, a pattern such as texts/*.jsonl, or a URI of any of them; csv, tsv,
        jsonl, parquet or txt (also .gz). Rows are taken file by file, files in the order of their names.
    :param directory: path that every node sees, or URI.
    :param model: recipe name, artifact, checkpoint, Hub id, or a loaded model.
    :param column: column of the texts.
    :param id_column: column of the ids of the rows; None for their numbers from 0.
    :param kind: csv, tsv, jsonl, parquet or txt; None for each file's ending.
    :param delimiter: delimiter of csv and tsv; None: detected.
    :param header: whether csv and tsv begin with column names; else the columns are "0", "1", ...
    :param precision: "auto" requires that all processors choose the same, and raises naming a node.
    :param on_error: rows without a text: "skip" leaves them out, "blank" encodes an empty text; both list
        them in rejected.jsonl. "fail" raises at the first, before anything is encoded.
    :param part_rows: rows of a shard.
    :param address: of a cluster; None for the open connection, RAY_ADDRESS, or a new one on this machine.
    :param force: start over, and replace the vectors in the directory. For actor_threads and actors see
        `encode_dataset`, for the other arguments `Embedder.encode`.
    :raises FileNotFoundError: if there is no such file.
    :raises FileExistsError: if the directory holds something else.
    :raises ValueError: if it holds vectors of a run with other settings, naming those that differ; as
        `Embedder.encode`.
    :raises TableError: for a damaged file; if another process writes the directory; with on_error="fail",
        naming a row without a text.
    :raises OnnxsimEmbedError: if a node does not see a path, would compute other vectors (its processor or
        its versions), or the cluster cannot be reached.

    Usage::

        done = encode_files("texts/*.csv", "vectors", column="text")
        vectors = done.vectors.read()                     # float32 (n, 384)
        graph = onnxsim_embed.ray.write_graph("vectors", "graph", threshold=0.5)
    """
    part_rows = check_integer("part_rows", part_rows)
    connection.require_ray()  # before a model is loaded
    output = Directory(directory)
    locations = find_files(source)
    _check_output(output, locations)
    embedder, options = prepare_model(
        model, precision, max_seq_length, on_error, prompt_name=prompt_name, prompt=prompt,
        normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim,
        long_texts=long_texts, stride=stride,
    )  # fmt: skip
    columns = Columns(column, id_column, kind, delimiter, header, options.on_error)
    checkpoint = ShardCheckpoint(output)
    with checkpoint, connection.cluster(address), plain_errors():
        import ray

        connection.check_shared(output, locations[0])
        count_rows = ray.remote(num_cpus=1)(survey)
        surveys = [count_rows.remote(location, columns) for location in locations]
        files, id_type = with_rows(ray.get(surveys))
        connection.check_nodes(options)
        if (repeated := repeated_ids(files)) > 0:
            logger.warning("%s ids of %s are not unique", f"{repeated:,}", source)
        total = sum(file.rows for file in files)
        # Names, rows and bytes of the input files, wherever they are.
        contents = [[display_name(f.location).rpartition("/")[2], f.rows, f.digest] for f in files]
        settings = {
            **model_settings(embedder),
            **{name: getattr(options.provenance, name) for name in SETTINGS},
            "column": column,
            "id_column": id_column,
            "kind": kind,
            "delimiter": delimiter,
            "header": header,
            "blank": options.on_error == "blank",
            "part_rows": part_rows,
            "rows": total,
            "input": hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16],
        }
        checkpoint.resume(settings, force)
        groups = group_files(files, part_rows)
        count = groups[-1].shards(part_rows).stop
        shards = checkpoint.finished(count)
        rows_found = sum(
            shard.rows + sum(not entry.encoded for entry in shard.diagnostics)
            for shard in shards.values()
        )
        plan = None
        times: list[float] = []
        if len(shards) < count:
            plan = connection.plan_actors(connection.cluster_cpus(), actor_threads, actors)
            with progress_bar(
                desc="Encoding", unit=" texts", total=total, initial=rows_found,
                smoothing=0.1, disable=not show_progress_bar,
            ) as bar:  # fmt: skip
                packed = ray.put(PackedModel.of(embedder))
                for number, shard, rows, when in encode_shards(
                    groups, dict(shards), columns, part_rows, plan, model=packed, options=options,
                    output=output, token=checkpoint.token, id_type=id_type,
                ):  # fmt: skip
                    shards[number] = shard
                    times += when
                    bar.update(rows)
        vectors = VectorDirectory(
            output,
            options.provenance.truncate_dim or options.provenance.dim,
            tuple(shard for _, shard in sorted(shards.items())),
            options.provenance,
        )
        checkpoint.finish(vectors, count)
    diagnostics = [entry for shard in vectors.shards for entry in shard.diagnostics]
    reports = {display_name(file.location): file.report for file in files}
    seconds = max(times, default=0.0) - min(times, default=0.0)
    return EncodedFiles(vectors, rows_found, diagnostics, plan, seconds, reports)


def _check_output(output: Directory, inputs: Sequence[str]) -> None:
    """Raise if the output is a file, has no parent directory, or holds an input or something else."""
    local = output.local
    if local is not None and local.exists() and not local.is_dir():
        raise FileExistsError(f"{local} exists and is a file; choose another name")
    if local is not None and not local.parent.is_dir():
        raise FileNotFoundError(f"cannot write {local}: there is no directory {local.parent}")
    if any(display_name(location).startswith(f"{output}/") for location in inputs):
        raise FileExistsError(
            f"{output} holds texts to encode; choose another directory for the vectors"
        )
    names = [name for name in output.names() if not name.startswith(".")]
    if names and JOB not in names:
        raise FileExistsError(
            f"{output} exists and is not a directory of vectors; choose another directory"
        )
