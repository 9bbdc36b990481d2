"""The parts of a directory of vectors: those that are there, and those that a cluster makes.

Ray Data runs it: tasks read parts of the input, actors encode them and write each as one file, and tell the
driver how many rows it has. A part's rows depend on the input and its number alone, and its file appears whole, so
that whatever dies, a part is there once or not yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import Checkpoint, differing_settings
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.vector_directory import (
    FORMAT_VERSION,
    INDEX,
    JOB,
    REJECTED,
    VectorDirectory,
    VectorShard,
    pack_shard,
    read_shard,
    shard_file,
)
from onnxsim_embed.ray.connection import EXPECTED, READER_SHARE, Actors, pack, quiet, unpack
from onnxsim_embed.ray.datasets import pool
from onnxsim_embed.ray.encoder import EncodeOptions, TextEncoder
from onnxsim_embed.ray.texts import Columns, Group, TextPart, read_parts

# Parts of an earlier run that are looked into at the same time.
PARTS_AT_ONCE = 16


class _Journal(Checkpoint):
    progress: ClassVar[Mapping[str, type]] = {"format_version": int}
    format_version = FORMAT_VERSION


class PartsJob:
    """Parts to encode, and those that are there.

    :param settings: what the vectors depend on.
    """

    def __init__(
        self, storage: Directory, settings: Mapping[str, Any], groups: Sequence[Group], id_type: str
    ) -> None:
        self._storage = storage
        self._settings = dict(settings)
        self._groups = groups
        self._part_rows = int(settings["part_rows"])
        self._id_type = id_type
        self._done: dict[int, VectorShard] = {}
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
        there = [number for number in range(self._count) if shard_file(number) in names]
        with ThreadPoolExecutor(
            PARTS_AT_ONCE
        ) as readers:  # an object store takes its time for each
            parts = readers.map(partial(read_shard, self._storage), there)
            self._done = {n: part for n, part in zip(there, parts, strict=True) if part is not None}
        return sum(
            part.rows + sum(not entry.encoded for entry in part.diagnostics)
            for part in self._done.values()
        )

    def _compare(self, data: bytes) -> None:
        found = _Journal.parse(data, f"{self._storage}/{JOB}")
        if differing := differing_settings(found, self._settings):
            raise ValueError(
                f"{self._storage} belongs to a run with other settings ({differing}): finish that run, "
                "choose another output, or start over with force=True"
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
            PartReader(columns, self._part_rows, self._id_type), batch_size=1, num_cpus=READER_SHARE
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
            part: VectorShard = unpack(row["told"])
            self._done[int(row["part"])] = part
            self._times += row["times"]
            yield int(row["rows"])

    def finish(self, vectors: VectorDirectory) -> VectorDirectory:
        """Write the index, and return the vectors."""
        lost = [number for number in range(self._count) if number not in self._done]
        if lost:
            raise TableError(
                f"{self._storage}: {len(lost)} parts were not written, the first is "
                f"{shard_file(lost[0])}; give the same command again"
            )
        whole = replace(vectors, shards=tuple(self._done[number] for number in range(self._count)))
        whole.write_index()
        for name in self._storage.names():
            if name.startswith((".part-", ".probe-")):  # left by a process that was killed
                self._storage.delete(name)
        return whole


class PartReader:
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
        storage: Directory,
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

    def _write(self, part: TextPart) -> VectorShard:
        places, vectors, remarks = self._encoder.encode(part.ids, part.values)
        data, digest = pack_shard(
            [part.ids[place] for place in places],
            vectors,
            remarks,
            self._encoder.origin,
            self._id_type,
        )
        self._storage.write(shard_file(part.number), data)
        return VectorShard(shard_file(part.number), len(places), digest, tuple(remarks))
