"""Files of texts -> a directory of vectors, on a cluster; a run that was stopped is continued.

Ray Data runs it: tasks read parts of the input, actors encode them and write each as one file, and tell the
driver how many rows it has. A part's rows depend on the input and its number alone, and its file appears whole, so
that whatever dies, a part is there once or not yet.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsim_embed.encode_job import identity
from onnxsim_embed.errors import TableError
from onnxsim_embed.kept_rows import differing_settings
from onnxsim_embed.progress import progress_bar
from onnxsim_embed.ray.cluster import (
    EXPECTED,
    READER_SHARE,
    Actors,
    check_shared,
    cluster,
    cpus_of,
    nodes,
    pack,
    plain_errors,
    plan_actors,
    quiet,
    require_ray,
    unpack,
)
from onnxsim_embed.ray.datasets import load_model, pool
from onnxsim_embed.ray.encoder import EncodeOptions, PackedModel, TextEncoder
from onnxsim_embed.ray.texts import (
    Columns,
    Group,
    TextFile,
    TextPart,
    group_files,
    read_parts,
    survey,
    with_rows,
)
from onnxsim_embed.storage import Storage, find_files, shown
from onnxsim_embed.vector_store import (
    FORMAT_VERSION,
    INDEX,
    JOB,
    REJECTED,
    Remark,
    VectorDirectory,
    VectorPart,
    pack_part,
    part_file,
    read_part,
)

if TYPE_CHECKING:
    from onnxsim_embed.embedder import Embedder

# Parts of an earlier run that are looked into at the same time.
PARTS_AT_ONCE = 16

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
    remarks: Sequence[Remark]
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
    storage = Storage.at(directory)
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
        job = _Job(storage, settings, group_files(files, part_rows), id_type)
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
    remarks = [remark for part in vectors.parts for remark in part.remarks]
    return EncodedFiles(vectors, found, remarks, plan, job.seconds)


def _check_directory(storage: Storage, inputs: Sequence[str]) -> None:
    """Refuse a directory that holds something else than vectors of such a job, or would become an input.

    :raises FileExistsError: naming the directory.
    """
    local = storage.local
    if local is not None and local.exists() and not local.is_dir():
        raise FileExistsError(f"{local} exists and is a file; choose another name")
    if local is not None and not local.parent.is_dir():
        raise FileNotFoundError(f"cannot write {local}: there is no directory {local.parent}")
    if any(location.startswith(f"{storage.location}/") for location in inputs):
        raise FileExistsError(
            f"{shown(storage.location)} holds texts to encode; choose another directory for the vectors"
        )
    names = [name for name in storage.names() if not name.startswith(".")]
    if names and JOB not in names:
        raise FileExistsError(
            f"{shown(storage.location)} exists and holds no vectors of such a job; choose another directory"
        )


def _survey(locations: Sequence[str], columns: Columns) -> tuple[list[TextFile], str]:
    """Count the rows of each file, side by side; return those that have some, and the type of their ids."""
    import ray

    count = ray.remote(num_cpus=1)(survey)
    waiting = [count.remote(location, columns) for location in locations]
    return with_rows(ray.get(waiting))


def _digest(files: Sequence[TextFile]) -> str:
    """Return what tells an input from another: its files' names, rows and bytes, wherever they lie."""
    told = [[shown(file.location).rpartition("/")[2], file.rows, file.digest] for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


class _Job:
    """Parts to encode, and those that are there.

    :param settings: what the vectors depend on.
    """

    def __init__(
        self, storage: Storage, settings: Mapping[str, Any], groups: Sequence[Group], id_type: str
    ) -> None:
        self._storage = storage
        self._settings = dict(settings)
        self._groups = groups
        self._part_rows = int(settings["part_rows"])
        self._id_type = id_type
        self._done: dict[int, VectorPart] = {}
        self._times: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds from the first part's start to the last one's end, of those of this run."""
        return max(self._times) - min(self._times) if self._times else 0.0

    @property
    def _count(self) -> int:
        return self._groups[-1].parts(self._part_rows).stop if self._groups else 0

    @property
    def missing(self) -> list[Group]:
        """Groups of which a part is missing."""
        return [
            group
            for group in self._groups
            if any(number not in self._done for number in group.parts(self._part_rows))
        ]

    def begin(self, force: bool) -> int:
        """Find the parts that are there; return the rows they were made of.

        :raises ValueError: if they are those of another job, naming what differs.
        """
        names = set(self._storage.names())
        if force:
            # The index first, as it says that all is there, and the job last, by which the next run knows the rest.
            for name in sorted(names, key=lambda name: (name == JOB, name != INDEX)):
                if name in (INDEX, JOB, REJECTED) or name.startswith("part-"):
                    self._storage.delete(name)
            names = set()
        if JOB in names:
            self._compare(self._storage.read(JOB))
        else:
            table = {"format_version": FORMAT_VERSION, **self._settings}
            self._storage.write(JOB, (json.dumps(table, indent=1) + "\n").encode())
        there = [number for number in range(self._count) if part_file(number) in names]
        with ThreadPoolExecutor(
            PARTS_AT_ONCE
        ) as readers:  # an object store takes its time for each
            parts = readers.map(partial(read_part, self._storage), there)
            self._done = {n: part for n, part in zip(there, parts, strict=True) if part is not None}
        return sum(
            part.rows + sum(not remark.encoded for remark in part.remarks)
            for part in self._done.values()
        )

    def _compare(self, data: bytes) -> None:
        where = self._storage.location
        try:
            found = json.loads(data)
            version = found["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise TableError(f"{where}/{JOB} is damaged: start over with --force") from None
        if version != FORMAT_VERSION:
            raise TableError(
                f"{where}/{JOB} has format version {version}, this version of onnxsim-embed writes "
                f"{FORMAT_VERSION}: start over with --force"
            )
        if differing := differing_settings(found, self._settings):
            raise ValueError(
                f"{where} holds vectors of another job ({differing}): choose another directory, or start "
                "over with --force"
            )

    def run(
        self,
        columns: Columns,
        model: Any,  # noqa: ANN401 - a reference
        options: EncodeOptions,
        plan: Actors,
    ) -> Iterator[int]:
        """Encode the parts that are missing; yield the rows of each as it is written."""
        import ray.data

        groups = [
            {
                "group": pack(group),
                "done": [n for n in group.parts(self._part_rows) if n in self._done] or [-1],
            }
            for group in self.missing
        ]
        ds = ray.data.from_items(groups, override_num_blocks=len(groups))
        quiet(ds.context)
        ds = ds.map_batches(
            _Reader(columns, self._part_rows, self._id_type), batch_size=1, num_cpus=READER_SHARE
        )
        ds = ds.map(
            PartEncoder,
            num_cpus=plan.cpus,
            compute=pool(plan.count),
            fn_constructor_kwargs={
                "model": model,
                "options": options,
                "threads": plan.threads,
                "storage": self._storage,
                "id_type": self._id_type,
            },
        )
        for row in ds.iter_rows():
            part: VectorPart = unpack(row["told"])
            self._done[int(row["part"])] = part
            self._times += row["times"]
            yield int(row["rows"])

    def finish(self, vectors: VectorDirectory) -> VectorDirectory:
        """Write the index, and return the vectors."""
        lost = [number for number in range(self._count) if number not in self._done]
        if lost:
            raise TableError(
                f"{self._storage.location}: {len(lost)} parts were not written, the first is "
                f"{part_file(lost[0])}; give the same command again"
            )
        whole = replace(vectors, parts=tuple(self._done[number] for number in range(self._count)))
        whole.write_index()
        for name in self._storage.names():
            if name.startswith((".part-", ".probe-")):  # left by a process that was killed
                self._storage.delete(name)
        return whole


class _Reader:
    """Reads the parts of groups of files, in tasks of Ray Data."""

    def __init__(self, columns: Columns, part_rows: int, id_type: str) -> None:
        self._read = partial(read_parts, columns=columns, part_rows=part_rows, id_type=id_type)

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a row for each part that is missing."""
        group: Group = unpack(batch["group"][0])
        done = [int(number) for number in batch["done"][0]]
        try:
            for part in self._read(group, done=done):
                yield {"texts": [pack(part)]}
        except EXPECTED as error:
            yield {"texts": [pack(error)]}


class PartEncoder:
    """Encodes parts and writes their files; one actor of `encode_files`."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a reference
        options: EncodeOptions,
        threads: int,
        storage: Storage,
        id_type: str,
    ) -> None:
        self._encoder = TextEncoder(model, options, threads)
        self._storage = storage
        self._id_type = id_type

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a part; return what the index says of it."""
        began = time.time()
        number, rows = -1, 0
        try:
            texts: TextPart = unpack(row["texts"])
            number, rows = texts.number, len(texts.values)
            told: object = self._write(texts)
        except EXPECTED as error:
            told = error
        return {"part": number, "rows": rows, "told": pack(told), "times": [began, time.time()]}

    def _write(self, part: TextPart) -> VectorPart:
        places, vectors, remarks = self._encoder.encode(part.ids, part.values)
        data, digest = pack_part(
            [part.ids[place] for place in places],
            vectors,
            remarks,
            self._encoder.origin,
            self._id_type,
        )
        self._storage.write(part_file(part.number), data)
        return VectorPart(part_file(part.number), len(places), digest, tuple(remarks))
