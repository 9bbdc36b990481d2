"""The shards of a directory of vectors: its checkpoint, and the actors that encode the missing ones.

Tasks of Ray Data read shards of the input; actors encode each, write it as one file and return its metadata. The
rows of a shard depend on the input and its number alone, and its file appears complete, so that whatever dies, a
shard exists once or not yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from onnxsim_embed.errors import TableError
from onnxsim_embed.files.atomic import json_bytes
from onnxsim_embed.files.checkpoint import Checkpoint
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
from onnxsim_embed.ray.connection import READER_SHARE, Actors
from onnxsim_embed.ray.encoder import TextEncoder
from onnxsim_embed.ray.tasks import EXPECTED, actor_pool, pack, unpack
from onnxsim_embed.ray.texts import Columns, Group, TextShard, read_shards

# Shards of an earlier run whose metadata is read at the same time: object stores are slow to answer.
PARALLEL_READS = 16

# Token of the run that writes a directory. An object store has no locks: the last run takes over.
OWNER = ".owner"


class ShardCheckpoint(Checkpoint):
    """Checkpoint in the output directory itself, whose files are the finished shards.

    A directory on a disk is locked. In an object store, and against actors that survive their driver, each
    shard is written only while the token of the run is that in the directory.
    """

    progress: ClassVar[Mapping[str, type]] = {"format_version": int}
    format_version = FORMAT_VERSION

    def __init__(self, output: Directory) -> None:
        self.output = output
        self.token = uuid4().hex
        self._locked = output.local is not None
        super().__init__(output.local or Path(JOB))  # in an object store, no path is used
        self.name, self.journal_name = str(output), f"{output}/{JOB}"

    def __enter__(self) -> Checkpoint:
        """See `Checkpoint`."""
        return super().__enter__() if self._locked else self

    def __exit__(self, *raised: object) -> None:
        """See `Checkpoint`."""
        if self._locked:
            super().__exit__(*raised)

    def resume(self, settings: Mapping[str, Any], force: bool = False) -> dict[str, Any] | None:
        """See `Checkpoint`; takes over the directory, and writes the journal of a new run."""
        journal = super().resume(settings, force)
        if journal is None:
            self.record()
        else:
            self._take_over()
        return journal

    def clear(self) -> None:
        """See `Checkpoint`; the index first, which marks the directory as complete, and the journal last."""
        self._take_over()
        for name in sorted(self.output.names(), key=lambda name: (name == JOB, name != INDEX)):
            if name in (INDEX, JOB, REJECTED) or name.startswith("part-"):
                self.output.delete(name)

    def read(self) -> dict[str, Any] | None:
        """See `Checkpoint`; earlier versions had fewer settings."""
        journal = super().read()
        return journal and {"header": True, "blank": False, **journal}

    def _take_over(self) -> None:
        self.output.write(OWNER, self.token.encode())

    def _load(self) -> bytes | None:
        return self.output.read(JOB) if JOB in self.output.names() else None

    def _store(self, journal: dict[str, Any]) -> None:
        self.output.write(JOB, json_bytes(journal))

    def finished(self, count: int) -> dict[int, VectorShard]:
        """Return the undamaged shards with numbers below `count`."""
        names = set(self.output.names())
        numbers = [number for number in range(count) if shard_file(number) in names]
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            shards = pool.map(partial(read_shard, self.output), numbers)
            return {n: shard for n, shard in zip(numbers, shards, strict=True) if shard is not None}

    def finish(self, vectors: VectorDirectory, count: int) -> None:
        """Write the index.

        :raises TableError: if shards are missing, or another run has taken over.
        """
        if len(vectors.shards) < count:
            missing = count - len(vectors.shards)
            raise TableError(f"{self.name}: {missing} shards were not written; repeat the call")
        check_owner(self.output, self.token)
        vectors.write_index()
        for name in self.output.names():
            if name == OWNER or name.startswith((".part-", ".probe-")):  # left by killed processes
                self.output.delete(name)


def check_owner(output: Directory, token: str) -> None:
    """Raise TableError if the token in the directory is not that of this run."""
    try:
        owner = output.read(OWNER).decode()
    except FileNotFoundError:
        owner = ""
    if owner != token:
        raise TableError(f"another process is writing {output}, and has taken over: this run stops")


def encode_shards(
    groups: Sequence[Group],
    finished: Mapping[int, VectorShard],
    columns: Columns,
    shard_rows: int,
    plan: Actors,
    **encoder: Any,  # noqa: ANN401
) -> Iterator[tuple[int, VectorShard, int, list[float]]]:
    """Encode the shards that are not finished; yield number, metadata, input rows, and start and end of each.

    :param encoder: arguments of `ShardEncoder`.
    """
    import ray.data

    rows = []
    for group in groups:
        numbers = group.shards(shard_rows)
        done = [number for number in numbers if number in finished]
        if len(done) < len(numbers):
            rows.append({"group": pack((group, done))})
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    context = dataset.context
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = context.target_min_block_size = 1  # a row for each block
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    reading = {"columns": columns, "shard_rows": shard_rows}
    dataset = dataset.map_batches(
        _read_group, batch_size=1, num_cpus=READER_SHARE, fn_kwargs=reading
    ).map(
        ShardEncoder,
        num_cpus=plan.cpus,
        compute=actor_pool(context, plan.count),
        fn_constructor_kwargs={"threads": plan.threads, **encoder},
    )
    for row in dataset.iter_rows():
        yield unpack(row["result"])


def _read_group(
    batch: Mapping[str, Any], columns: Columns, shard_rows: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each missing shard of a group of files; a task of Ray Data."""
    group, finished = unpack(batch["group"][0])
    try:
        for shard in read_shards(group, columns, shard_rows, finished):
            yield {"texts": [pack(shard)]}
    except EXPECTED as error:
        yield {"texts": [pack(error)]}


class ShardEncoder:
    """Encodes shards and writes their files; an actor of `encode_files`.

    :param encoder: arguments of `TextEncoder`.
    """

    def __init__(self, output: Directory, token: str, id_type: str, **encoder: Any) -> None:  # noqa: ANN401
        self._encoder: TextEncoder | Exception
        try:
            self._encoder = TextEncoder(**encoder)
        except EXPECTED as error:  # Ray would repeat the start
            self._encoder = error
        self._output, self._token, self._id_type = output, token, id_type

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a shard; return what `encode_shards` yields, or an error."""
        began = time.time()
        try:
            texts: TextShard = unpack(row["texts"])
            shard = self._write(texts)
            result: object = texts.number, shard, len(texts.texts), [began, time.time()]
        except EXPECTED as error:
            result = error
        return {"result": pack(result)}

    def _write(self, texts: TextShard) -> VectorShard:
        encoder = self._encoder
        if isinstance(encoder, Exception):
            raise encoder
        encoded, vectors, diagnostics = encoder.encode(texts.ids, texts.texts, texts.problems)
        ids = [texts.ids[row] for row in encoded]
        content, digest = pack_shard(ids, vectors, diagnostics, encoder.provenance, self._id_type)
        check_owner(self._output, self._token)
        file = shard_file(texts.number)
        self._output.write(file, content)
        return VectorShard(file, len(encoded), digest, tuple(diagnostics))
