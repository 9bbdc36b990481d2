"""`make test-ray`: runs on a cluster of several nodes whose workers, nodes and drivers die.

Not part of the default suite (its name is not test_*.py): it takes minutes. Nodes are processes on this machine,
with the tiny model of the other tests; what they write is compared with one process's results, bit for bit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from local_cluster import ACTOR, LOADING, MB, LocalCluster, count, meanwhile, watched, workers

import onnxsim_embed
from onnxsim_embed import Embedder
from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.vector_directory import open_vectors
from onnxsim_embed.ray import cluster as connect
from onnxsim_embed.ray import connection as connecting
from onnxsim_embed.ray import encode_dataset, encode_files, write_graph

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the engine's own
    pytest.mark.timeout(240),
]

NAMES = ("river", "school", "solar", "market", "road", "water", "village", "forest", "bank", "dog")


def some_texts(number: int, words: int = 12) -> list[str]:
    rng = np.random.default_rng(number)
    return [f"{i} {' '.join(row)}" for i, row in enumerate(rng.choice(NAMES, (number, words)))]


def write_jsonl(path: Path, texts: Iterable[str], first: int = 0) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        for row, text in enumerate(texts, first):
            stream.write(json.dumps({"name": f"n{row}", "text": text}) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def three(surroundings) -> Iterator[LocalCluster]:
    """Three nodes of one processor."""
    nodes = LocalCluster(1, 1, 1)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def model(artifact) -> Embedder:
    return Embedder(artifact, precision="int8", threads=1)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return some_texts(16_000)


@pytest.fixture(scope="module")
def expected(model, texts) -> np.ndarray:
    return model.encode(texts)


def check_vectors(directory: Path, expected: np.ndarray) -> None:
    """All rows are there, once, in order, to the bit, and nothing else is."""
    vectors = open_vectors(directory)
    assert vectors.ids() == [f"n{row}" for row in range(len(expected))]
    np.testing.assert_array_equal(vectors.read(), expected)
    names = {"index.json", "job.json", *(part.file for part in vectors.shards)}
    assert {path.name for path in directory.iterdir()} == names


def check_graph(directory: Path, expected: Any) -> None:
    """The graph is that of one process, to the bit, and nothing else is in its directory."""
    found = onnxsim_embed.open_graph(directory)
    got = found.to_matrix()
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    names = {"index.json", *(part.file for part in found.parts)}
    names |= {"diagonal.npy"} if found.k is None else set()
    assert {path.name for path in directory.iterdir()} == names


# workers


def encode(nodes: LocalCluster, model: Embedder, tmp_path: Path, texts: Sequence[str], **more: Any):
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    return encode_files(
        source, tmp_path / "vectors", model, column="text", id_column="name", part_rows=100,
        address=nodes.address, **more,
    )  # fmt: skip


def test_workers_that_are_killed_cost_nothing(three, model, tmp_path, texts, expected):
    """An actor that encodes, then every other one: those that remain or take their places do the rest."""
    parts = tmp_path / "vectors"

    def busy() -> list[psutil.Process]:
        return workers(ACTOR) if 10 <= count(parts, "part-*") < 100 else []

    def strike(found: list[psutil.Process]) -> None:
        found[0].kill()
        then = count(parts, "part-*")
        while count(parts, "part-*") < then + 20:
            time.sleep(0.01)
        for actor in workers(ACTOR):
            actor.kill()

    with meanwhile(busy, strike):
        done = encode(three, model, tmp_path, texts)
    assert done.actors.count == 3
    check_vectors(parts, expected)


def test_an_actor_that_dies_while_loading_is_replaced(three, model, tmp_path, texts, expected):
    with meanwhile(lambda: workers(LOADING), lambda found: found[0].kill()):
        encode(three, model, tmp_path, texts[:2000])
    check_vectors(tmp_path / "vectors", expected[:2000])


# nodes


def test_a_path_that_a_node_does_not_see_is_refused(three, tmp_path, monkeypatch):
    """All nodes of this machine see its disk: those that are asked to tell lies do."""
    seen = connecting._sees

    def sees(storage, probe, readable, lost=tuple(node.node_id for node in three.others)):
        if ray.get_runtime_context().get_node_id() in lost:
            return readable
        return seen(storage, probe, readable)

    source = write_jsonl(tmp_path / "texts.jsonl", ["a"])
    vectors = Directory(tmp_path / "vectors")
    with connect(three.address):
        connecting.check_shared(vectors, str(source))
        with monkeypatch.context() as patch:
            patch.setattr(connecting, "_sees", sees)
            with pytest.raises(OnnxsimEmbedError, match=r"node .* does not see .*texts.jsonl"):
                connecting.check_shared(vectors, str(source))
    assert vectors.names() == []


def test_a_node_that_is_lost_while_encoding(three, model, tmp_path, texts, expected):
    parts = tmp_path / "vectors"
    with meanwhile(
        lambda: 10 <= count(parts, "part-*") < 100, lambda _: three.lose(three.others[0])
    ):
        encode(three, model, tmp_path, texts)
    check_vectors(parts, expected)


@pytest.mark.parametrize("how", [{"threshold": 0.6}, {"k": 5}], ids=["threshold", "best"])
def test_a_node_that_is_lost_while_comparing(three, tmp_path, how):
    """With tiles that were in its memory."""
    points = np.random.default_rng(5).standard_normal((20_000, 32)).astype(np.float32)
    if len(three.others) < 2:
        three.others.append(three.add())
    np.save(tmp_path / "points.npy", points)
    parts = tmp_path / ".graph.partial" / "parts"
    with meanwhile(lambda: count(parts, "p*.npz") > 10, lambda _: three.lose(three.others[0])):
        options = {"block_rows": 250, "address": three.address}
        found = write_graph(tmp_path / "points.npy", tmp_path / "graph", **options, **how)
    assert len(found.parts) == 80
    expected = onnxsim_embed.write_graph(points, tmp_path / "expected", **how)
    check_graph(tmp_path / "graph", expected.to_matrix())


# drivers


class Command:
    """The program in a process of its own, of which everything may be killed."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onnxsim_embed", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=240)
        err = re.sub(r"(?m)^\[\d{4}-.* logging\.cc.*\n", "", err)  # of Ray's core
        return self.process.returncode, out, err

    def kill_when(self, directory: Path, pattern: str, least: int) -> dict[str, tuple[int, int]]:
        """Kill it once so many files are there; return what tells them from others of their name."""
        while count(directory, pattern) < least:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)
        self.process.kill()
        self.process.communicate()
        return stamps(directory, pattern)


def stamps(directory: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Return inode and time of each file: both change where one is written again."""
    found = {}
    for path in directory.glob(pattern):
        with suppress(FileNotFoundError):  # the directory takes its place when all is there
            told = path.stat()
            found[path.name] = (told.st_ino, told.st_mtime_ns)
    return found


def test_a_driver_that_is_killed_while_encoding(artifact, model, tmp_path):
    texts = some_texts(60_000)
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    target = tmp_path / "vectors"
    call = ["encode", source, "-c", "text", "--id-column", "name", "-m", artifact, "--precision", "int8",
            "--engine", "ray", "-o", target]  # fmt: skip
    kept = Command(*call).kill_when(target, "part-*.parquet", 5)
    assert len(kept) < 25, "it was killed too late"
    code, _, err = Command("similarity", target, "-o", tmp_path / "graph", "--engine", "ray").end()
    assert (code > 0, err.count("\n")) == (True, 1), err
    assert "incomplete" in err
    code, out, err = Command(*call).end()
    assert (code, err) == (0, "")
    # An actor finishes its shard when the driver dies.
    found = int(re.search(r"Found ([\d,]+) rows", out)[1].replace(",", ""))
    assert len(kept) * 2048 <= found < 60_000
    now = stamps(target, "part-*.parquet")
    assert kept.items() <= now.items()
    check_vectors(target, model.encode(texts))
    code, _, err = Command(*call, "--max-seq-length", 20).end()
    assert (code, err.count("\n")) == (2, 1), err
    assert "max-seq-length: 48, now 20" in err
    assert stamps(target, "part-*.parquet") == now


def test_a_driver_that_is_killed_while_comparing(three, tmp_path):
    """On a cluster that goes on: what it was doing for the driver ends."""
    points = np.random.default_rng(9).standard_normal((40_000, 32)).astype(np.float32)
    np.save(tmp_path / "points.npy", points)
    target = tmp_path / "graph"
    call = ["similarity", tmp_path / "points.npy", "-k", "5", "--engine", "ray", "--address", three.address,
            "-o", target]  # fmt: skip
    parts = tmp_path / ".graph.partial" / "parts"
    kept = Command(*call).kill_when(parts, "p*.npz", 4)
    again = Command(*call)
    while again.process.poll() is None:
        assert kept.items() <= (kept | stamps(parts, "p*.npz")).items()
        time.sleep(0.02)
    code, _, err = again.end()
    assert (code, err) == (0, "")
    expected = onnxsim_embed.write_graph(points, tmp_path / "expected", k=5)
    check_graph(target, expected.to_matrix())


# memory and processors


def test_a_source_larger_than_the_object_store(artifact, model, tmp_path):
    """400 MB of texts through a store of 80 MB."""
    long = "the water of the river and the road " * 550  # 20 kB
    rows = 20_000
    write_jsonl(tmp_path / "texts.jsonl", (f"{row} {long}" for row in range(rows)))
    assert (tmp_path / "texts.jsonl").stat().st_size > 4 * 80 * MB
    nodes = LocalCluster(2, store=80 * MB)
    try:
        with watched() as use:
            encode_files(
                tmp_path / "texts.jsonl", tmp_path / "vectors", model, column="text", id_column="name",
                part_rows=200, address=nodes.address,
            )  # fmt: skip
    finally:
        nodes.close()
    print({name: f"{value // MB} MB" for name, value in vars(use).items()})
    check_vectors(
        tmp_path / "vectors", model.encode([f"{row} {long[:2000]}" for row in range(rows)])
    )
    assert use.spilled <= 40 * MB
    assert use.largest <= 500 * MB


@pytest.mark.parametrize("cpus", [2, 1])
@pytest.mark.timeout(150)
def test_few_processors_are_enough_for_actors_and_readers(cpus, model, tmp_path, texts, expected):
    """With 40 files to read, as many readers want to run; and Ray Data's own readers and writers."""
    nodes = LocalCluster(cpus)
    try:
        with connect(nodes.address):
            for number in range(40):
                first = number * 50
                path = tmp_path / f"texts{number:02d}.jsonl"
                write_jsonl(path, texts[first : first + 50], first)
            done = encode_files(
                tmp_path / "texts*.jsonl", tmp_path / "vectors", model, column="text",
                id_column="name", part_rows=50,
            )  # fmt: skip
            assert done.actors.count * done.actors.cpus < cpus
            check_vectors(tmp_path / "vectors", expected[:2000])
            ds = ray.data.read_json([str(path) for path in sorted(tmp_path.glob("*.jsonl"))])
            encode_dataset(ds, model, batch_size=100).write_parquet(str(tmp_path / "written"))
            rows = sorted(
                ray.data.read_parquet(str(tmp_path / "written")).take_all(),
                key=lambda row: int(row["name"][1:]),
            )
    finally:
        nodes.close()
    np.testing.assert_array_equal(np.stack([row["vector"] for row in rows]), expected[:2000])
