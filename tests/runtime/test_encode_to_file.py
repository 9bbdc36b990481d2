"""Texts into a file of vectors: the bytes of an uninterrupted run, whatever interrupted it."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import numpy as np
import pytest
from support import TEXTS, names, read_json, write_json
from support import provenance as example_provenance

from onnxsim_embed import Embedder
from onnxsim_embed.errors import TableError
from onnxsim_embed.files.provenance import differences, sidecar
from onnxsim_embed.files.vectors import read_provenance, read_vectors, write_vectors
from onnxsim_embed.runtime import pipeline, provenance
from onnxsim_embed.runtime.encode_to_file import encode_to_file
from onnxsim_embed.runtime.options import EncodeOptions

ROWS = [f"{text} {number}" for number, text in enumerate(TEXTS * 2)]  # 24
WINDOW = 4
RANGES = np.stack([np.full(32, -0.4), np.full(32, 0.3)]).astype(np.float32)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", WINDOW)


@pytest.fixture(scope="module")
def embedder(artifact):
    return Embedder(artifact, precision="fp32")


class StopError(Exception):
    """What an iterable of texts may raise."""


def stop_at(embedder, path, row, texts=ROWS, error=StopError, **options):
    """Run until a row, and return how many rows are finished."""
    raised = error("my own")

    def lines():
        yield from texts[:row]
        raise raised

    finished = []
    with pytest.raises(error) as caught:
        encode_to_file(embedder, lines(), path, on_rows=finished.append, **options)
    assert caught.value is raised
    return finished[-1]


@pytest.fixture(params=[".npy", ".parquet"])
def path(request, tmp_path):
    return tmp_path / f"v{request.param}"


@pytest.fixture(scope="module")
def complete(embedder, tmp_path_factory):
    """The bytes of files that were written without an interruption, by suffix (.json: the sidecar)."""
    directory = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "WINDOW_TEXTS", 5)
        for suffix in (".npy", ".parquet"):
            encode_to_file(embedder, ROWS, directory / f"v{suffix}")
    return {path.suffix: path.read_bytes() for path in directory.iterdir()}


# what is written


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_file_holds_the_vectors_of_encode(artifact, path, precision):
    embedder = Embedder(artifact, precision=precision)
    result = encode_to_file(embedder, iter(ROWS), path, prompt_name="query")
    expected = embedder.encode([f"a dog {text}" for text in ROWS])
    np.testing.assert_array_equal(read_vectors(path), expected, strict=True)
    assert (result.path, result.rows, result.dim, result.dtype) == (path, 24, 32, np.float32)
    assert (result.rows_found, result.report.texts) == (0, 24)
    assert names(path.parent) == [path.name, *(["v.npy.json"] if path.suffix == ".npy" else [])]


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_each_dtype_is_that_of_encode_and_survives_an_interruption(embedder, path, dtype):
    options = {
        "precision": dtype,
        "ranges": RANGES[:, :16] if dtype in ("int8", "uint8") else None,
        "truncate_dim": 16,
        "normalize_embeddings": True,
    }
    stop_at(embedder, path, 9, **options)
    result = encode_to_file(embedder, ROWS, path, **options)
    expected = embedder.encode(ROWS, **options)
    np.testing.assert_array_equal(read_vectors(path), expected, strict=True)
    assert (result.rows, result.dim, result.dtype) == (*expected.shape, expected.dtype)
    assert len(np.unique(expected)) > 2


def test_no_texts_become_an_empty_table(embedder, path):
    result = encode_to_file(embedder, [], path, truncate_dim=8)
    assert (result.rows, result.dim) == read_vectors(path).shape == (0, 8)


def test_texts_are_read_only_a_little_ahead_of_finished_rows(embedder, tmp_path):
    read, ahead = count(), []
    lines = (f"project {number}" for number in islice(read, 100))

    def on_rows(rows):
        ahead.append(next(read) - len(ahead) - rows)

    encode_to_file(embedder, lines, tmp_path / "v.npy", on_rows=on_rows)
    assert ahead[0] == 0
    assert max(ahead) <= 2 * WINDOW


def test_the_report_is_that_of_this_call(embedder, tmp_path):
    """While another thread uses the same model."""
    with ThreadPoolExecutor(1) as other:
        queries = [other.submit(embedder.encode, "a query of somebody else") for _ in range(500)]
        results = [encode_to_file(embedder, ROWS, tmp_path / f"{i}.npy") for i in range(5)]
        for query in queries:
            query.cancel()
    assert [result.report.texts for result in results] == [24] * 5


# what continues


@pytest.mark.parametrize("rows", [[1], [3], [4], [11], [24], [2, 3, 9, 17]])
def test_interruptions_change_no_byte(artifact, embedder, path, complete, rows):
    for row, error in zip(
        rows, [TableError, StopError, KeyboardInterrupt, StopError], strict=False
    ):
        kept = stop_at(embedder, path, row, error=error)
    assert kept == rows[-1]
    assert names(path.parent) == [f".{path.name}.partial"]
    shutil.copytree(artifact, path.parent / "moved")
    moved = Embedder(path.parent / "moved", precision="fp32", threads=3)  # the same model
    result = encode_to_file(moved, ROWS, path, batch_size=2)
    assert path.read_bytes() == complete[path.suffix]
    if path.suffix == ".npy":
        assert sidecar(path).read_bytes() == complete[".json"]
    assert (result.rows_found, result.report.texts) == (kept, 24 - kept)


def test_an_interruption_between_batches_keeps_the_finished_ones(embedder, path, complete):
    finished = []

    def on_rows(rows):
        finished.append(rows)
        if rows == 2 * WINDOW:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_to_file(embedder, ROWS, path, on_rows=on_rows)
    assert finished == [0, 4, 8]
    assert embedder.last_report.texts < 24  # the rest is not encoded in the background
    encode_to_file(embedder, ROWS, path, on_rows=finished.append)
    assert finished[3:] == [8, 12, 16, 20, 24]
    assert path.read_bytes() == complete[path.suffix]


def test_texts_after_the_finished_ones_may_change(embedder, path):
    assert stop_at(embedder, path, 11, ROWS[:11]) == 11
    texts = [*ROWS[:11], "other"]
    encode_to_file(embedder, texts, path)
    np.testing.assert_array_equal(read_vectors(path), embedder.encode(texts))


def test_force_starts_over_and_replaces_a_file_at_the_end(embedder, path, complete):
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        encode_to_file(embedder, ROWS, path)
    stop_at(embedder, path, 11, ["other"] * 24, force=True)
    stop_at(embedder, path, 9, force=True)
    assert path.read_text() == "mine"
    assert encode_to_file(embedder, ROWS, path).rows_found == 9  # force is not asked for again
    assert path.read_bytes() == complete[path.suffix]


@pytest.mark.parametrize(("start", "rows"), [(0, [0, 2, 4, 8, 16, 24]), (3, [3, 4, 8, 16, 24]), (17, [17, 24])])  # fmt: skip
def test_the_first_rows_are_kept_early(embedder, path, complete, monkeypatch, start, rows):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 8)
    monkeypatch.setattr(pipeline, "FIRST_ROWS", 2)
    if start:
        stop_at(embedder, path, start)
    finished = []
    encode_to_file(embedder, ROWS, path, on_rows=finished.append)
    assert finished == rows
    assert path.read_bytes() == complete[path.suffix]


def test_a_finished_file_is_returned_for_the_same_call_only(embedder, path, monkeypatch):
    before = encode_to_file(embedder, ROWS, path, prompt_name="query")
    content, finished = path.read_bytes(), []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "stream", None)  # nothing is encoded
        again = encode_to_file(embedder, iter(ROWS), path, prompt="a dog ", on_rows=finished.append)
        assert (again.rows, again.dim, again.dtype) == (before.rows, before.dim, before.dtype)
        assert (again.rows_found, again.report.texts, finished) == (24, 0, [24])
        for texts, options, reason in [
            (ROWS, {}, "prompt: a dog , now None"),
            (ROWS, {"prompt": "a dog ", "truncate_dim": 8}, "truncate_dim: None, now 8"),
            (ROWS[:23], {"prompt": "a dog "}, "only 23 texts"),
            ([*ROWS, "x"], {"prompt": "a dog "}, "more than 24 texts"),
            (["x", *ROWS[1:]], {"prompt": "a dog "}, "texts differ"),
        ]:
            with pytest.raises(FileExistsError) as caught:
                encode_to_file(embedder, texts, path, **options)
            assert reason in str(caught.value)
    assert path.read_bytes() == content
    write_vectors(np.load(path) if path.suffix == ".npy" else read_vectors(path), path)
    with pytest.raises(FileExistsError):  # of texts that nothing tells
        encode_to_file(embedder, ROWS, path, prompt_name="query")
    assert names(path.parent) == [path.name]


# what is rejected


@pytest.mark.parametrize(
    "texts",
    [["other", *ROWS[1:]], [*ROWS[:10], "other", *ROWS[11:]], [*ROWS[:9], ROWS[9] + ROWS[10], *ROWS[11:], "x"],
     ROWS[:10]],
)  # fmt: skip
def test_other_texts_are_rejected_and_the_rows_stay(embedder, path, complete, texts):
    stop_at(embedder, path, 11)
    with pytest.raises(ValueError, match="11 rows"):
        encode_to_file(embedder, texts, path)
    assert encode_to_file(embedder, ROWS, path).rows_found == 11
    assert path.read_bytes() == complete[path.suffix]


def test_other_options_are_named(embedder, tmp_path):
    stop_at(embedder, tmp_path / "v.npy", 11)
    for options, difference in [
        ({"prompt": "x\n"}, r"(prompt: '', now 'x\n')"),
        ({"precision": "int8", "ranges": RANGES}, "(dtype: float32, now int8, ranges: None, now "),
        ({"normalize_embeddings": True}, "(normalize: False, now True)"),
        ({"truncate_dim": 16}, "(truncate_dim: None, now 16)"),
    ]:
        with pytest.raises(ValueError, match="settings") as caught:
            encode_to_file(embedder, ROWS, tmp_path / "v.npy", **options)
        assert difference in str(caught.value)
    assert encode_to_file(embedder, ROWS, tmp_path / "v.npy").rows_found == 11


def test_another_model_or_version_is_named(embedder, artifact, tmp_path, monkeypatch):
    path = tmp_path / "v.npy"
    stop_at(embedder, path, 11)
    shutil.copytree(artifact, tmp_path / "changed")
    manifest = tmp_path / "changed/onnxsim_embed.json"
    write_json(manifest, read_json(manifest) | {"pooling": ["cls"]})
    shorter = Embedder(artifact, precision="fp32")
    shorter.max_seq_length = 20
    for changed, message in [
        (Embedder(artifact, precision="int8"), "precision: fp32, now int8"),
        (Embedder(tmp_path / "changed", precision="fp32"), r"\(model: tiny \w{16}, now tiny \w{16}\)"),
        (shorter, "max_seq_length: 48, now 20"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            encode_to_file(changed, ROWS, path)
    monkeypatch.setattr(Embedder, "provider", "CUDAExecutionProvider")
    monkeypatch.setattr(provenance, "__version__", "9.9")
    named = r"\(provider: CPU\w+, now CUDA\w+, onnxsim_embed: .*, now 9\.9\)"
    with pytest.raises(ValueError, match=named):
        encode_to_file(embedder, ROWS, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "needs ranges"),
        ({"precision": "uint8", "ranges": RANGES[:, :3]}, r"shape \(2, 32\), got \(2, 3\)"),
        ({"truncate_dim": 33}, "truncate_dim"),
        ({"prompt_name": "x"}, "prompt_name 'x'"),
    ],
)
def test_an_invalid_option_is_named_before_anything_is_read(embedder, tmp_path, options, message):
    def never():
        pytest.fail("the texts were read")
        yield ""

    with pytest.raises(ValueError, match=message):
        encode_to_file(embedder, never(), tmp_path / "v.npy", **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [(None, TypeError, "text 13 is NoneType"), ("a\ud800b", ValueError, r"text 13 .*U\+D800 at character 1")],
)  # fmt: skip
@pytest.mark.parametrize("before", [0, 6])
def test_an_invalid_text_is_named_by_its_row(
    embedder, path, complete, text, error, message, before
):
    if before:
        stop_at(embedder, path, before)
    with pytest.raises(error, match=message):
        encode_to_file(embedder, [*ROWS[:13], text, *ROWS[14:]], path)
    assert encode_to_file(embedder, ROWS, path).rows_found == 13
    assert path.read_bytes() == complete[path.suffix]


def test_anything_but_texts_leaves_nothing(embedder, path):
    for texts, named in [("a road", "got str: "), (None, "got NoneType: "), ([7], "text 0 is int")]:
        with pytest.raises(TypeError, match=named):
            encode_to_file(embedder, texts, path)
    assert names(path.parent) == []


def test_a_relative_path_stays_the_same_file(embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def lines():
        yield from ROWS[:10]
        os.chdir(tmp_path / "elsewhere")
        yield from ROWS[10:]

    encode_to_file(embedder, lines(), "v.npy")
    assert names(tmp_path) == ["elsewhere", "v.npy", "v.npy.json"]


# provenance


def test_provenance_states_what_the_vectors_depend_on(embedder, artifact, tmp_path):
    for name in ("a.npy", "b.npy"):
        options = {"prompt_name": "query", "truncate_dim": 8, "precision": "float16"}
        encode_to_file(embedder, ROWS, tmp_path / name, **options)
    assert sidecar(tmp_path / "a.npy").read_bytes() == sidecar(tmp_path / "b.npy").read_bytes()
    fp32 = read_provenance(tmp_path / "a.npy")
    assert (fp32.model, fp32.precision, fp32.pooling) == ("tiny", "fp32", "mean")
    assert (fp32.prompt, fp32.max_seq_length, fp32.dim) == ("a dog ", 48, 32)
    assert (fp32.truncate_dim, fp32.dtype, fp32.normalize) == (8, "float16", False)
    int8 = provenance.provenance_of(
        Embedder(artifact, precision="int8"), EncodeOptions(truncate_dim=8)
    )
    assert int8.model_digest == fp32.model_digest != fp32.weights_digest
    assert int8.weights_digest != fp32.weights_digest
    assert not differences(int8, fp32)


def test_a_replaced_file_gets_provenance_of_its_own(embedder, tmp_path):
    path = tmp_path / "v.npy"
    for unlink in (False, True):  # a sidecar without its file may be replaced
        write_vectors(np.ones((2, 4), np.float32), path, example_provenance())
        if unlink:
            path.unlink()
        encode_to_file(embedder, ROWS, path, force=not unlink)
        assert read_provenance(path) == provenance.provenance_of(embedder)
