"""Encoding and comparing on a Ray cluster on this machine: the results of one process, to the bit."""

from __future__ import annotations

import csv
import json
import os
import shutil

import numpy as np
import pytest
from pyarrow import fs
from scipy import sparse
from support import TEXTS, change_json, contents, provenance, read_json, write_json
from vector_sets import clustered_vectors

pytest.importorskip("ray")

import onnxsim_embed
from onnxsim_embed import Embedder, similarity_matrix
from onnxsim_embed.artifact import precision as choosing
from onnxsim_embed.errors import OnnxsimEmbedError, TableError
from onnxsim_embed.files import locations
from onnxsim_embed.files.locations import Directory
from onnxsim_embed.files.vector_directory import VectorDirectory, open_vectors
from onnxsim_embed.ray import cluster, encode_dataset, encode_files, encoder, graph, write_graph
from onnxsim_embed.ray.connection import Actors, plan_actors
from onnxsim_embed.ray.encoder import PackedModel, prepare_model
from onnxsim_embed.ray.shards import ShardCheckpoint, check_owner
from onnxsim_embed.similarity.memory import PEAK_ENTRY_BYTES

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the engine's own
    pytest.mark.timeout(300),
]

WORDS = ["river", "school", "solar", "market", "road", "water", "village", "forest", "007", "line\nbreak"]  # fmt: skip


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(count)]


def write_csv(path, texts, first=0):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["name", "text"], *((f"n{first + i}", t) for i, t in enumerate(texts))])
    return path


@pytest.fixture(scope="module", autouse=True)
def engine(tmp_path_factory):
    """A cluster of this machine's processors, whose workers keep models in a directory of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RAY_ADDRESS", raising=False)
        moved, dup2 = [], os.dup2
        patch.setattr(os, "dup2", lambda a, b, *rest: moved.append(b) or dup2(a, b, *rest))
        with cluster():
            patch.setattr(os, "dup2", dup2)
            assert 2 not in moved  # other threads print to standard error meanwhile
            yield


@pytest.fixture(scope="module")
def model(artifact):
    return Embedder(artifact, precision="int8", threads=1)


@pytest.fixture(scope="module")
def encoded(artifact, model, tmp_path_factory):
    """Three files of 90 rows, encoded in parts of 20; read-only."""
    directory = tmp_path_factory.mktemp("encoded")
    texts = some_texts(90)
    for number, (start, stop) in enumerate([(0, 5), (5, 8), (8, 90)]):
        write_csv(directory / f"part{number}.csv", texts[start:stop], start)
    done = encode_files(
        directory / "part*.csv", directory / "vectors", model, column="text", part_rows=20
    )
    return directory, texts, done


# encoding


def test_vectors_are_those_of_one_process(encoded, model):
    _, texts, done = encoded
    assert np.array_equal(done.vectors.read(), model.encode(texts))
    assert done.vectors.ids() == list(range(90))
    assert (done.rows_found, done.remarks) == (0, [])
    assert [part.rows for part in done.vectors.shards] == [20, 20, 20, 20, 10]


def test_what_is_done_is_not_done_again(encoded, model, tmp_path):
    directory, _, finished = encoded
    arguments = (directory / "part*.csv", tmp_path / "vectors", model)
    shutil.copytree(directory / "vectors", tmp_path / "vectors")
    (tmp_path / "vectors/part-00001.parquet").unlink()
    (tmp_path / "vectors/part-00003.parquet").write_bytes(b"half a fi")
    (tmp_path / "vectors/index.json").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "vectors").glob("part-*")}
    with pytest.raises(FileNotFoundError, match="incomplete"):
        open_vectors(tmp_path / "vectors")
    done = encode_files(*arguments, column="text", part_rows=20)
    assert done.rows_found == 50
    assert np.array_equal(done.vectors.read(), finished.vectors.read())
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "vectors").glob("part-*")}
    made = {name for name in after if after[name] != before.get(name)}
    assert made == {"part-00001.parquet", "part-00003.parquet"}
    again = encode_files(*arguments, column="text", part_rows=20)
    assert again.vectors == done.vectors
    assert (again.rows_found, again.actors) == (90, None)


def test_a_directory_of_another_run_is_rejected(encoded, artifact, model, tmp_path):
    directory, _, done = encoded
    shutil.copytree(artifact, tmp_path / "changed")
    manifest = tmp_path / "changed/onnxsim_embed.json"
    write_json(manifest, read_json(manifest) | {"pooling": ["cls"]})
    changed = Embedder(tmp_path / "changed", precision="int8")
    for source, used, options, message in [
        ("part*.csv", model, {"part_rows": 30}, r"\(part_rows: 20, now 30\)"),
        ("part*.csv", model, {"max_seq_length": 9}, "max_seq_length: 48, now 9"),
        ("part*.csv", model, {"precision": "fp32"}, "precision: int8, now fp32"),
        ("part*.csv", model, {"kind": "tsv", "delimiter": ","}, "kind: None, now tsv, delimiter: None, now ,"),
        ("part*.csv", changed, {}, r"model: tiny \w{16}, now tiny \w{16}"),
        ("part2.csv", model, {}, "rows: 90, now 82"),
    ]:  # fmt: skip
        arguments = {"column": "text", "part_rows": 20} | options
        with pytest.raises(ValueError, match=message):
            encode_files(directory / source, directory / "vectors", used, **arguments)
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another directory"):
        encode_files(directory / "part2.csv", tmp_path, model, column="text", force=True)
    assert np.array_equal(open_vectors(directory / "vectors").read(), done.vectors.read())


def test_force_starts_over(encoded, model, tmp_path):
    directory, texts, _ = encoded
    target = tmp_path / "vectors"
    shutil.copytree(directory / "vectors", target)
    options = {"column": "text", "id_column": "name", "part_rows": 4, "force": True}
    done = encode_files(directory / "part0.csv", target, model, **options)
    assert done.vectors.ids() == ["n0", "n1", "n2", "n3", "n4"]
    assert np.array_equal(open_vectors(target).read(), model.encode(texts[:5]))
    assert [shard.rows for shard in done.vectors.shards] == [4, 1]
    assert sorted(path.name for path in target.iterdir()) == [
        "index.json", "job.json", "part-00000.parquet", "part-00001.parquet",
    ]  # fmt: skip


def test_two_runs_do_not_write_one_directory(encoded, model, tmp_path):
    directory, _, _ = encoded
    output = Directory(tmp_path / "vectors")
    taken = pytest.raises(TableError, match="another process")
    with ShardCheckpoint(output), taken:
        encode_files(directory / "part0.csv", tmp_path / "vectors", model, force=True)


def test_the_last_run_takes_over_in_an_object_store(monkeypatch):
    """There are no locks: the earlier run can neither finish nor write a shard."""
    system, _ = fs.FileSystem.from_uri("mock:///")
    system.create_dir("bucket")
    monkeypatch.setattr(locations, "_connect", lambda root: (system, "bucket"))
    output = Directory("s3://bucket/vectors")
    first, second = ShardCheckpoint(output), ShardCheckpoint(output)
    with first, second:
        first.resume({"input": "a"})
        with pytest.raises(ValueError, match="input: a, now b"):
            second.resume({"input": "b"})
        check_owner(output, first.token)
        output.write("part-00000.parquet", b"")
        second.resume({"input": "b"}, force=True)
        assert output.names() == [".owner", "job.json"]
        check_owner(output, second.token)
        with pytest.raises(TableError, match="another process"):
            check_owner(output, first.token)
        with pytest.raises(TableError, match="another process"):
            first.finish(VectorDirectory(output, 4, (), provenance()), 0)
        second.finish(VectorDirectory(output, 4, (), provenance()), 0)
        assert open_vectors(output.location).rows == 0
        assert output.names() == ["index.json", "job.json"]
    with pytest.raises(TableError, match="another process"):
        check_owner(output, second.token)


POISON = [
    {"id": 7, "text": "solar energy"},
    {"id": 8, "text": None},
    {"id": 9, "text": 3.5},
    {"id": 10, "text": "a road"},
    {"id": 11, "text": "road " * 2_000_000},
    {"id": 12, "text": "a lone \ud800 surrogate"},
    {"id": 13},
]


def test_rows_without_a_usable_text_are_reported(model, artifact, run, tmp_path):
    path, target = tmp_path / "texts.jsonl", tmp_path / "vectors"
    path.write_text("".join(json.dumps(row) + "\n" for row in POISON))
    options = {"column": "text", "id_column": "id", "part_rows": 4}
    done = encode_files(path, target, model, **options)
    assert done.vectors.ids() == [7, 10, 11]
    found = {entry.id: (entry.reason, entry.encoded) for entry in done.remarks}
    assert found[8] == found[13] == ("has no text (null)", False)
    assert found[9] == ("has no text (3.5)", False)
    assert "10,000,000 characters" in found[11][0]
    assert "surrogate" in found[12][0]
    assert [found[name][1] for name in (11, 12)] == [True, False]
    lines = (target / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [8, 9, 11, 12, 13]
    assert np.array_equal(done.vectors.read(), model.encode([POISON[i]["text"] for i in (0, 3, 4)]))
    # A search names rows as the input does.
    _, out, _ = run("search", "a road", "--in", target, "-m", artifact, "-k", 1, "-q")
    assert out.split()[2] == "10"
    again = encode_files(path, target, model, **options)  # diagnostics outlive the run
    assert {entry.id for entry in again.remarks} == {8, 9, 11, 12, 13}
    assert again.rows_found == 7
    for on_error in ("fail", "raise"):
        with pytest.raises(TableError, match=r"row 1 has no text \(null\)"):
            encode_files(path, tmp_path / "v", model, on_error=on_error, **options)
    assert list(tmp_path.glob("v/*")) == []  # nothing was encoded
    with pytest.raises(ValueError, match="blank: False, now True"):
        encode_files(path, target, model, on_error="blank", **options)


def test_shards_without_a_vector(model, tmp_path):
    path, target = tmp_path / "texts.jsonl", tmp_path / "vectors"
    for values, rows in [([None] * 4 + ["a road"], 1), ([None] * 3, 0)]:
        path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
        done = encode_files(path, target, model, part_rows=2, force=True)
        assert [shard.rows for shard in done.vectors.shards] == [0, 0, 1][: -(-len(values) // 2)]
        assert np.array_equal(done.vectors.read(), model.encode(["a road"] * rows))
        assert done.vectors.ids() == [4] * rows
        graph_of = write_graph(target, tmp_path / "g", threshold=0.5, force=True)
        assert graph_of.to_matrix().shape == (rows, rows)


def test_repeated_ids_are_named(model, tmp_path, caplog):
    for name, texts in [("a", ["a road", "a river"]), ("b", ["a road", "the sun", "the sun"])]:
        write_csv(tmp_path / f"{name}.csv", texts)
    done = encode_files(tmp_path, tmp_path / "v", model, column="text", id_column="text")
    assert done.vectors.ids() == ["a road", "a river", "a road", "the sun", "the sun"]
    assert "2 ids" in caplog.text


def test_an_input_that_changed_is_rejected_and_a_run_of_0_1_0_continues(model, tmp_path):
    texts = some_texts(9)
    path, target = write_csv(tmp_path / "a.csv", texts), tmp_path / "v"
    encode_files(path, target, model, column="text")
    before = contents(target)
    (target / "index.json").unlink()
    write_csv(path, texts[::-1])
    with pytest.raises(ValueError, match=r"\(input: \w{16}, now \w{16}\)"):
        encode_files(path, target, model, column="text")
    write_csv(path, texts)
    missing = dict.fromkeys(("kind", "delimiter", "header", "blank"))  # as version 0.1.0 wrote it
    change_json(target / "job.json", **missing)
    assert encode_files(path, target, model, column="text").rows_found == 9
    assert contents(target) | {"job.json": b""} == before | {"job.json": b""}


# processors and versions of the nodes

EQUAL = {"onnxsim_embed": onnxsim_embed.__version__, "onnxruntime": encoder.RUNTIME_VERSION}


@pytest.mark.parametrize(
    ("driver", "node", "loaded", "precision", "error"),
    [(True, False, False, "auto", "no VNNI.*'fp32'"), (False, True, False, "auto", "chose fp32"),
     (True, False, True, "auto", "chose int8"), (True, True, False, "auto", None),
     (False, False, False, "auto", None), (True, False, False, "fp32", None),
     (True, False, False, "int8", None), (True, False, True, "int8", None)],
)  # fmt: skip
def test_int8_is_never_the_driver_s_choice_for_other_processors(
    artifact, model, monkeypatch, caplog, driver, node, loaded, precision, error
):
    """A stand-in for two processors, with and without VNNI."""
    reasons = {True: "VNNI", False: "no VNNI"}
    monkeypatch.setattr(choosing, "int8_supported", lambda: (driver, reasons[driver]))
    _, options = prepare_model(model if loaded else str(artifact), precision)
    options.check_node("10.0.0.1", (driver, reasons[driver], EQUAL))
    caplog.clear()
    if error is None:
        options.check_node("10.0.0.7", (node, reasons[node], EQUAL))
    else:
        with pytest.raises(OnnxsimEmbedError, match=rf"node 10\.0\.0\.7: .*{error}"):
            options.check_node("10.0.0.7", (node, reasons[node], EQUAL))
    unlike = options.provenance.precision == "int8" and not node and error is None
    assert ("10.0.0.7" in caplog.text) is unlike


@pytest.mark.parametrize(("facts", "message"), [
    ((False, "no VNNI", EQUAL), "no VNNI"),
    ((True, "", EQUAL | {"onnxruntime": "1.9"}), r"\(onnxruntime: .*, now 1\.9\)"),
])  # fmt: skip
def test_a_node_that_would_compute_other_vectors_stops_the_run(
    encoded, model, tmp_path, monkeypatch, facts, message
):
    import ray.data

    directory, _, _ = encoded
    packed, options = prepare_model(model)
    monkeypatch.setattr(encoder, "node_facts", lambda: facts)
    with pytest.raises(OnnxsimEmbedError, match=f"node .*{message}"):
        encode_files(directory / "part0.csv", tmp_path / "v", model, column="text")
    assert not list(tmp_path.glob("v/part-*"))
    with pytest.raises(OnnxsimEmbedError, match=f"node .*{message}"):  # in an actor
        encoder.TextEncoder(PackedModel.of(packed), options, 1)
    ds = ray.data.from_items([{"text": "a"}])
    with pytest.raises(OnnxsimEmbedError, match=f"node .*{message}"):
        encode_dataset(ds, model)


def test_mistakes_are_errors_without_ray_s_words(encoded, model, tmp_path):
    directory, _, _ = encoded
    (tmp_path / "above/below").mkdir(parents=True)
    shutil.copy(directory / "part0.csv", tmp_path / "above/below")
    above = f"file://{tmp_path}/above"
    for source, target, options, error, message in [
        (directory / "part0.csv", tmp_path / "v", {"column": "no"}, ValueError, "it has: name, text"),
        (directory / "part0.csv", tmp_path / "v", {"on_error": "ignore"}, ValueError, "on_error"),
        (directory / "part0.csv", directory, {}, FileExistsError, "holds texts"),
        (f"{above}/below/part0.csv?x=1", f"{above}?x=1", {}, FileExistsError, "holds texts"),
        (directory / "part0.csv", tmp_path / "a/b/c", {}, FileNotFoundError, "no directory"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            encode_files(source, target, model, **{"column": "text"} | options)
    assert not (tmp_path / "v").exists()


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(OnnxsimEmbedError, match=r"cannot connect to .* at 127\.0\.0\.1:9: "):
        cluster("127.0.0.1:9").__enter__()


def test_a_dataset_gets_vectors(model, tmp_path):
    import ray.data

    texts = [*some_texts(70), None]
    # Ray's own readers and writers reserve a whole processor each: there has to be one.
    ray.data.from_items(
        [{"id": i, "text": text} for i, text in enumerate(texts)], override_num_blocks=3
    ).write_parquet(str(tmp_path / "texts"))
    ds = ray.data.read_parquet(str(tmp_path / "texts"))
    encode_dataset(ds, model, batch_size=16).write_parquet(str(tmp_path / "vectors"))
    rows = ray.data.read_parquet(str(tmp_path / "vectors")).take_all()
    rows.sort(key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(71))
    assert np.array_equal(np.stack([row["vector"] for row in rows[:70]]), model.encode(texts[:70]))
    assert {row["vector_error"] for row in rows[:70]} == {None}
    assert (rows[70]["vector"], rows[70]["vector_error"]) == (None, "has no text (null)")


def test_a_damaged_copy_of_the_model_is_made_anew(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path))
    packed = PackedModel.of(model)
    first = packed.load(1)
    (first.artifact.directory / "onnx/model_int8.onnx").write_bytes(b"damaged")
    assert np.array_equal(packed.load(1).encode(["a road"]), model.encode(["a road"]))


def test_options_are_those_of_encode(model):
    arguments = {"prompt_name": "query", "prompt": None, "truncate_dim": 8,
                 "normalize_embeddings": True, "long_texts": "mean", "stride": 1}  # fmt: skip
    embedder, options = prepare_model(model, "auto", 9, "skip", **arguments)
    assert (options.encode.prompt, options.provenance.prompt) == ("a dog ", "a dog ")
    assert (options.provenance.truncate_dim, options.provenance.max_seq_length) == (8, 9)
    assert options.provenance.long_texts == "mean, stride 1"
    expected = embedder.encode(TEXTS, **arguments)
    assert np.array_equal(embedder.encode_with(options.encode, TEXTS), expected)
    assert embedder.last_report.split > 0


# comparing


@pytest.fixture(scope="module")
def vectors():
    return clustered_vectors(300, centres=60)


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.3}, {"threshold": 0.3, "include_self": False}, {"k": 1}, {"k": 7}, {"k": 100}],
    ids=str,
)
def test_graphs_are_those_of_one_process(vectors, tmp_path, options):
    made = write_graph(vectors, tmp_path / "g", block_rows=64, **options)
    same = onnxsim_embed.write_graph(vectors, tmp_path / "same", **options)
    assert len(made.parts) == 5
    assert made.vectors == same.vectors
    matrix, expected = made.to_matrix(), same.to_matrix()
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(matrix, name), getattr(expected, name))


def test_an_interrupted_graph_continues(vectors, tmp_path, monkeypatch):
    write_missing = graph.Comparison.write_missing

    def interrupted(self, show_progress_bar):
        write_missing(self, show_progress_bar)
        (self.shards / "part-00002.npz").write_bytes(b"half a shard")
        (self.shards / "piece-00002-00000.npz").touch()  # of version 0.1.0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graph.Comparison, "write_missing", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_graph(vectors, tmp_path / "g", threshold=0.3, block_rows=64)
    shards = tmp_path / ".g.partial/parts"
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("part-*")}
    with pytest.raises(ValueError, match=r"\(threshold: 0.3, now 0.4\)"):
        write_graph(vectors, tmp_path / "g", threshold=0.4, block_rows=64)
    with pytest.raises(ValueError, match=r"onnxsim_embed\.ray\.write_graph"):
        onnxsim_embed.write_graph(vectors, tmp_path / "g", threshold=0.3)
    made = write_graph(vectors, tmp_path / "g", threshold=0.3)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "g").glob("p*")}
    assert [name for name in after if after[name] != before.get(name)] == ["part-00002.npz"]
    assert np.array_equal(made.to_matrix().data, similarity_matrix(vectors, threshold=0.3).data)
    assert write_graph(vectors, tmp_path / "g", threshold=0.3) == made
    with pytest.raises(FileExistsError, match=r"threshold: 0\.3, now 0\.4"):
        write_graph(vectors, tmp_path / "g", threshold=0.4)
    assert not (tmp_path / ".g.partial").exists()


def test_encoded_directories_are_compared(encoded, tmp_path):
    directory, _, done = encoded
    made = write_graph(directory / "vectors", tmp_path / "g", threshold=0.5, block_rows=33)
    expected = similarity_matrix(done.vectors.read(), threshold=0.5)
    assert np.array_equal(made.to_matrix().toarray(), expected.toarray())
    np.save(tmp_path / "v.npy", done.vectors.read())
    made = write_graph(tmp_path / "v.npy", tmp_path / "h", threshold=0.5, block_rows=33)
    assert np.array_equal(made.to_matrix().toarray(), expected.toarray())


def test_invalid_arguments_of_graphs(vectors, tmp_path):
    broken = vectors.copy()
    broken[250, 3] = np.nan
    np.save(tmp_path / "v.npy", broken)
    with pytest.raises(ValueError, match="NaN or infinity, first in row 250"):
        write_graph(tmp_path / "v.npy", tmp_path / "g", threshold=0.5, block_rows=100)
    with pytest.raises(ValueError, match="block_rows"):
        write_graph(vectors, tmp_path / "g", k=3, block_rows=0)
    with pytest.raises(FileNotFoundError):
        write_graph(tmp_path / "v.parquet", tmp_path / "g", k=3)
    (tmp_path / "v.parquet").touch()
    with pytest.raises(ValueError, match=r"\.npy file"):
        write_graph(tmp_path / "v.parquet", tmp_path / "g", k=3)
    with pytest.raises(MemoryError, match=r"more than 100 pairs .* raise the threshold"):
        write_graph(vectors, tmp_path / "m", threshold=0.1, max_memory=100 * PEAK_ENTRY_BYTES)


@pytest.mark.parametrize("rows", [0, 1])
def test_sets_without_pairs(rows, tmp_path):
    made = write_graph(np.ones((rows, 4), np.float32), tmp_path / "g", threshold=0.5)
    assert made.to_matrix().shape == (rows, rows)
    assert made.nnz == rows


# the command line


def test_the_commands_do_both(artifact, run, texts_csv, tmp_path):
    target, graph_target = tmp_path / "vectors", tmp_path / "graph"
    encode = ["encode", texts_csv, "--engine", "ray", "-c", "text", "-m", artifact, "-o", target]
    code, out, err = run(*encode)
    assert (code, err) == (0, "")
    assert "Encoded 12 rows with" in out
    assert f"Wrote {target}: 12 x 32 float32 in 1 shard." in out
    code, out, err = run("similarity", target, "--engine", "ray", "-t", "0.4", "-o", graph_target)
    assert (code, err) == (0, "")
    assert "Compared 12 rows" in out
    # Without the engine, the directory is one of vectors like any other.
    code, out, _ = run("similarity", target, "-t", "0.4", "-o", tmp_path / "m.npz", "--show", "1")
    assert code == 0
    expected = sparse.load_npz(tmp_path / "m.npz").toarray()
    assert np.array_equal(onnxsim_embed.open_graph(graph_target).to_matrix().toarray(), expected)
    code, out, _ = run(*encode)
    assert (code, out.splitlines()[:3]) == (0, [
        f"{texts_csv}: 2 of 12 texts are empty: rows 2, 3.",
        f"Read {texts_csv}: column 'text' (as chosen), delimiter ','.",
        "Found 12 rows of an earlier run.",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [("", [0, 2]), ("--on-error blank", [0, 1, 2]), ("--on-error fail", None), ("--strict", None)],
)
def test_delimiter_header_and_rows_without_a_text(run, artifact, tmp_path, arguments, ids):
    path, target = tmp_path / "a.csv", tmp_path / "v"
    path.write_text('1|a road\n2\n3|the, "sun"\n')
    reading = ["--delimiter", "|", "--no-header", "-c", "1", *arguments.split()]
    code, out, err = run("encode", path, "--engine", "ray", "-m", artifact, "-o", target, *reading)
    if ids is None:
        assert code == 1
        assert "row 1 has no text (null)" in err
        assert not (target / "index.json").exists()
        return
    assert (code, err.startswith("row 1: ")) == (0, True)
    assert ("1 row without a usable text" in out) is (ids == [0, 2])
    texts = ["a road", "", 'the, "sun"']
    assert open_vectors(target).ids() == ids
    expected = Embedder(artifact).encode([texts[row] for row in ids])
    assert np.array_equal(open_vectors(target).read(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode t.csv -o v --engine spark", "'spark'"),
        ("encode - -o v --engine ray", "standard input"),
        ("encode t.csv -o v.npy --engine ray", "directory"),
        ("encode t.csv -o v --engine ray --dtype int8", "--dtype"),
        ("encode t.csv -o v --engine ray --strict --on-error skip", "--strict"),
        ("similarity v -o g --engine ray --on-error skip", "--on-error"),
        ("encode t.csv -o v.npy --id-column n", "--id-column"),
        ("similarity v -o m.npz --engine ray", "directory"),
        ("similarity v -o m --engine ray --estimate", "--estimate"),
    ],
)
def test_options_that_the_engine_does_not_have(reject, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in reject(*arguments.split())


# processors


@pytest.mark.parametrize(
    ("nodes", "threads", "count"),
    [([1], 1, 1), ([2], 2, 1), ([3], 3, 1), ([6], 3, 2), ([16], 4, 4), ([16, 16, 2], 2, 17), ([5, 7], 1, 12)],
)  # fmt: skip
def test_actors_use_every_processor_and_reserve_less(nodes, threads, count):
    for spare in (0, 1):
        plan = plan_actors(nodes, spare=spare)
        assert (plan.threads, plan.count) == (threads, count)
        assert threads * count == sum(nodes)
        for cpus in nodes:
            left = cpus - cpus // threads * plan.cpus
            assert left >= max(spare, 0.0999)


def test_actors_that_fit_nowhere_are_refused():
    with pytest.raises(ValueError, match="no node has 8 CPUs for an actor; the largest has 4"):
        plan_actors([4, 2], threads=8)
    assert plan_actors([4, 2], threads=2, count=2) == Actors(2, 2, 1.8)


def test_no_statistics_are_sent():
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
