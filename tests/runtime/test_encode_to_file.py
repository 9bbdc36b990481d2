"""Texts into a file of vectors: the bytes of an uninterrupted run, whatever stopped it."""

from __future__ import annotations

import json
import os
import shutil
from itertools import count, islice

import numpy as np
import pytest
from support import TEXTS
from support import provenance as example_provenance

from onnxsim_embed import Embedder
from onnxsim_embed.errors import TableError
from onnxsim_embed.files.checkpoint import EmbeddingCheckpoint
from onnxsim_embed.files.provenance import differences, sidecar
from onnxsim_embed.files.vectors import read_provenance, read_vectors, write_vectors
from onnxsim_embed.runtime import pipeline, provenance
from onnxsim_embed.runtime.encode_to_file import check_format, encode_to_file
from onnxsim_embed.runtime.options import EncodeOptions

ROWS = [f"{text} {number}" for number, text in enumerate(TEXTS * 2)]  # 24
BLOCK = 4
RANGES = np.stack([np.full(32, -0.4), np.full(32, 0.3)]).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", BLOCK)


@pytest.fixture(scope="module")
def embedder(artifact):
    return Embedder(artifact, precision="fp32")


class StopError(Exception):
    """What an iterable of texts may raise."""


def stopping(texts, row, error=StopError):
    """Yield texts up to a row, then fail."""
    yield from texts[:row]
    raise error


def stop_at(embedder, path, row, texts=ROWS, error=StopError, **options):
    """Run until a row, and return how many rows are kept."""
    kept = []
    with pytest.raises(error):
        encode_to_file(embedder, stopping(texts, row, error), path, on_rows=kept.append, **options)
    return kept[-1]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def finished(path):
    """The names that a finished file has."""
    return [path.name, f"{path.name}.json"] if path.suffix == ".npy" else [path.name]


@pytest.fixture(params=[".npy", ".parquet"])
def path(request, tmp_path):
    return tmp_path / f"v{request.param}"


@pytest.fixture(scope="module")
def whole(embedder, tmp_path_factory):
    """The bytes of files that were written without a stop, by ending."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "WINDOW_TEXTS", 5)
        for ending in (".npy", ".parquet"):
            encode_to_file(embedder, ROWS, directory / f"v{ending}")
    return {path.suffix: path.read_bytes() for path in directory.iterdir()}  # .json: the sidecar


# what is written


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_file_holds_the_vectors_of_encode(artifact, path, precision):
    embedder = Embedder(artifact, precision=precision)
    result = encode_to_file(embedder, iter(ROWS), path)
    expected = embedder.encode(ROWS)
    np.testing.assert_array_equal(read_vectors(path), expected, strict=True)
    assert (result.path, result.rows, result.dim, result.dtype) == (path, 24, 32, np.float32)
    assert (result.rows_found, result.report.texts) == (0, 24)
    assert names(path.parent) == finished(path)


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8", "binary", "ubinary"])
def test_each_number_format_is_that_of_encode_and_survives_a_stop(embedder, path, dtype):
    ranges = RANGES[:, :16] if dtype in ("int8", "uint8") else None
    options = {
        "precision": dtype,
        "ranges": ranges,
        "truncate_dim": 16,
        "normalize_embeddings": True,
    }
    stop_at(embedder, path, 9, **options)
    result = encode_to_file(embedder, ROWS, path, **options)
    expected = embedder.encode(ROWS, **options)
    np.testing.assert_array_equal(read_vectors(path), expected, strict=True)
    assert (result.rows, result.dim, result.dtype) == (*expected.shape, expected.dtype)
    assert len(np.unique(expected)) > 2


def test_a_prompt_comes_before_each_text(embedder, path):
    encode_to_file(embedder, ROWS, path, prompt_name="query")
    expected = embedder.encode([f"a dog {text}" for text in ROWS])
    np.testing.assert_array_equal(read_vectors(path), expected)


def test_no_texts_become_an_empty_table(embedder, path):
    result = encode_to_file(embedder, [], path, truncate_dim=8)
    assert (result.rows, result.dim) == read_vectors(path).shape == (0, 8)


def test_texts_are_read_only_a_little_ahead_of_what_is_kept(embedder, tmp_path):
    read, ahead = count(), []

    def lines():
        for number in islice(read, 100):
            yield f"project {number}"

    def on_rows(rows):
        ahead.append(next(read) - len(ahead) - rows)

    encode_to_file(embedder, lines(), tmp_path / "v.npy", on_rows=on_rows)
    assert ahead[0] == 0
    assert max(ahead) <= 2 * BLOCK


# what is continued


@pytest.mark.parametrize("row", [1, 3, 4, 11, 23, 24])
def test_a_stop_changes_no_byte(embedder, path, whole, row):
    assert stop_at(embedder, path, row) == row
    assert names(path.parent) == [f".{path.name}.partial"]
    result = encode_to_file(embedder, ROWS, path)
    assert path.read_bytes() == whole[path.suffix]
    if path.suffix == ".npy":
        assert sidecar(path).read_bytes() == whole[".json"]
    assert (result.rows_found, result.report.texts) == (row, 24 - row)
    assert names(path.parent) == finished(path)


def test_many_stops_change_no_byte(embedder, path, whole):
    for row in (2, 3, 9, 9, 17):
        stop_at(embedder, path, row)
    encode_to_file(embedder, ROWS, path)
    assert path.read_bytes() == whole[path.suffix]


def test_a_stop_between_blocks_keeps_those_that_are_done(embedder, path, whole):
    kept = []

    def on_rows(rows):
        kept.append(rows)
        if rows == 2 * BLOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_to_file(embedder, ROWS, path, on_rows=on_rows)
    assert kept == [0, 4, 8]
    assert embedder.last_report.texts < 24  # the rest does not go on behind the caller's back
    encode_to_file(embedder, ROWS, path, on_rows=kept.append)
    assert kept[3:] == [8, 12, 16, 20, 24]
    assert path.read_bytes() == whole[path.suffix]


def test_where_nothing_is_left_the_file_is_written(embedder, path, whole, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingCheckpoint, "finish", full)
        with pytest.raises(OSError, match="No space"):
            encode_to_file(embedder, ROWS, path)
    result = encode_to_file(embedder, ROWS, path)
    assert (result.rows_found, result.report.texts) == (24, 0)
    assert path.read_bytes() == whole[path.suffix]


def test_texts_that_were_appended_are_encoded_too(embedder, path, whole):
    assert stop_at(embedder, path, 11, ROWS[:11]) == 11
    encode_to_file(embedder, ROWS, path)
    assert path.read_bytes() == whole[path.suffix]


def test_force_starts_over(embedder, path, whole):
    stop_at(embedder, path, 11, [f"other {text}" for text in ROWS])
    result = encode_to_file(embedder, ROWS, path, force=True)
    assert result.rows_found == 0
    assert path.read_bytes() == whole[path.suffix]


def test_what_existed_is_replaced_by_force_and_only_at_the_end(embedder, path, whole):
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        encode_to_file(embedder, ROWS, path)
    stop_at(embedder, path, 11, force=True)
    assert path.read_text() == "mine"
    assert encode_to_file(embedder, ROWS, path).rows_found == 11
    assert path.read_bytes() == whole[path.suffix]


def test_other_threads_and_batches_go_on_where_a_job_stopped(artifact, path, whole):
    stop_at(Embedder(artifact, precision="fp32", threads=1), path, 11)
    encode_to_file(Embedder(artifact, precision="fp32", threads=3), ROWS, path, batch_size=2)
    assert path.read_bytes() == whole[path.suffix]


# what is refused


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["other", *ROWS[1:]], "texts differ from these"),
        ([*ROWS[:10], "other", *ROWS[11:]], "texts differ from these"),
        ([*ROWS[:9], ROWS[9] + ROWS[10], *ROWS[11:], "one more"], "texts differ from these"),
        (ROWS[:10], "10 texts"),
    ],
)
def test_other_texts_are_refused_and_the_rows_stay(embedder, path, whole, texts, message):
    stop_at(embedder, path, 11)
    with pytest.raises(ValueError, match=rf"11 rows.*{message}"):
        encode_to_file(embedder, texts, path)
    assert encode_to_file(embedder, ROWS, path).rows_found == 11
    assert path.read_bytes() == whole[path.suffix]


def test_a_change_beyond_the_kept_rows_is_no_other_job(embedder, path):
    stop_at(embedder, path, 11)
    texts = [*ROWS[:11], "other"]
    encode_to_file(embedder, texts, path)
    np.testing.assert_array_equal(read_vectors(path), embedder.encode(texts))


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"prompt_name": "query"}, "prompt: '', now 'a dog '"),
        ({"prompt": "x\n"}, r"prompt: '', now 'x\n'"),
        ({"precision": "float16"}, "dtype: float32, now float16"),
        ({"precision": "int8", "ranges": RANGES}, "dtype: float32, now int8, ranges: None, now "),
        ({"normalize_embeddings": True}, "normalize: False, now True"),
        ({"truncate_dim": 16}, "truncate_dim: None, now 16"),
    ],
)
def test_other_settings_are_refused_by_name(embedder, path, whole, options, difference):
    stop_at(embedder, path, 11)
    with pytest.raises(ValueError, match="settings") as caught:
        encode_to_file(embedder, ROWS, path, **options)
    assert f"({difference}" in str(caught.value)
    assert "\n" not in str(caught.value)
    encode_to_file(embedder, ROWS, path)
    assert path.read_bytes() == whole[path.suffix]


def test_other_ranges_are_refused(embedder, tmp_path):
    stop_at(embedder, tmp_path / "v.npy", 11, precision="int8", ranges=RANGES)
    with pytest.raises(ValueError, match=r"\(ranges: [0-9a-f]{16}, now [0-9a-f]{16}\)"):
        encode_to_file(embedder, ROWS, tmp_path / "v.npy", precision="int8", ranges=RANGES * 2)


def test_another_model_precision_length_or_version_is_refused(
    embedder, artifact, tmp_path, monkeypatch
):
    path = tmp_path / "v.npy"
    stop_at(embedder, path, 11)
    int8, shorter = Embedder(artifact, precision="int8"), Embedder(artifact, precision="fp32")
    shorter.max_seq_length = 20
    for changed, message in [
        (int8, "precision: fp32, now int8"),
        (shorter, "max_seq_length: 48, now 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_to_file(changed, ROWS, path)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "provider", "CUDAExecutionProvider")
        with pytest.raises(ValueError, match="provider: CPUExecutionProvider, now CUDA"):
            encode_to_file(embedder, ROWS, path)
    monkeypatch.setattr(provenance, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"\(onnxsim_embed: .*, now 9\.9\)"):
        encode_to_file(embedder, ROWS, path)


def test_the_same_weights_pooled_otherwise_are_another_model(embedder, artifact, tmp_path):
    stop_at(embedder, tmp_path / "v.npy", 11)
    shutil.copytree(artifact, tmp_path / "changed")
    manifest = tmp_path / "changed/onnxsim_embed.json"
    table = json.loads(manifest.read_text(encoding="utf-8")) | {"pooling": ["cls"]}
    manifest.write_text(json.dumps(table), encoding="utf-8")
    changed = Embedder(tmp_path / "changed", precision="fp32")
    with pytest.raises(ValueError, match=r"\(model: tiny [0-9a-f]{16}, now tiny [0-9a-f]{16}\)"):
        encode_to_file(changed, ROWS, tmp_path / "v.npy")


def test_a_moved_model_is_the_same_model(embedder, artifact, path, whole, tmp_path):
    stop_at(embedder, path, 11)
    shutil.copytree(artifact, tmp_path / "moved")
    encode_to_file(Embedder(tmp_path / "moved", precision="fp32"), ROWS, path)
    assert path.read_bytes() == whole[path.suffix]


def test_two_jobs_cannot_write_one_file(embedder, path):
    def lines():
        yield from ROWS[:10]
        with pytest.raises(TableError, match="another process is writing"):
            encode_to_file(embedder, ROWS, path)
        yield from ROWS[10:]

    encode_to_file(embedder, lines(), path)
    np.testing.assert_array_equal(read_vectors(path), embedder.encode(ROWS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"precision": "int8"}, "required for int8"),
        ({"ranges": RANGES}, "got precision 'float32'"),
        ({"precision": "uint8", "ranges": RANGES[:, :3]}, r"shape \(2, 32\), got \(2, 3\)"),
        ({"precision": "uint8", "ranges": RANGES[::-1]}, "minima"),
        ({"precision": "int8", "ranges": RANGES * np.nan}, "finite"),
        ({"truncate_dim": 33}, "truncate_dim"),
        ({"truncate_dim": -1}, "truncate_dim"),
        ({"prompt_name": "x"}, "prompt_name 'x'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_read(embedder, tmp_path, options, message):
    def never():
        pytest.fail("the texts were read")
        yield ""

    with pytest.raises(ValueError, match=message):
        encode_to_file(embedder, never(), tmp_path / "v.npy", **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize("texts", ["a road", b"a road", 7, None])
def test_what_is_no_iterable_of_texts_is_refused(embedder, tmp_path, texts):
    with pytest.raises(TypeError):
        encode_to_file(embedder, texts, tmp_path / "v.npy")
    assert names(tmp_path) == []


def test_check_format_accepts_what_there_is():
    for precision in ("float32", "float16", "binary", "ubinary"):
        check_format(precision, False)
    for precision in ("int8", "uint8"):
        check_format(precision, True)


# what fails midway


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [(None, TypeError, "text 13 is NoneType"), (7, TypeError, "text 13 is int"),
     ("a\ud800b", ValueError, r"text 13 is not valid Unicode: lone surrogate U\+D800 at character 1")],
)  # fmt: skip
@pytest.mark.parametrize("before", [0, 6])
def test_a_broken_text_is_named_by_its_row_and_those_before_are_kept(
    embedder, path, whole, text, error, message, before
):
    if before:
        stop_at(embedder, path, before)
    with pytest.raises(error, match=message):
        encode_to_file(embedder, [*ROWS[:13], text, *ROWS[14:]], path)
    assert encode_to_file(embedder, ROWS, path).rows_found == 13
    assert path.read_bytes() == whole[path.suffix]


def test_a_broken_first_text_leaves_nothing(embedder, path):
    with pytest.raises(TypeError, match="text 0 is int"):
        encode_to_file(embedder, [7, "a road"], path)
    assert names(path.parent) == []


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, TableError])
def test_an_error_of_the_iterable_passes_unchanged(embedder, path, error):
    raised = error("my own")

    def lines():
        yield from ROWS[:13]
        raise raised

    with pytest.raises(error) as caught:
        encode_to_file(embedder, lines(), path)
    assert caught.value is raised
    assert EmbeddingCheckpoint(path).read()


def test_a_relative_path_stays_the_same_file(embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def lines():
        yield from ROWS[:10]
        os.chdir(tmp_path / "elsewhere")
        yield from ROWS[10:]

    encode_to_file(embedder, lines(), "v.npy")
    assert names(tmp_path) == ["elsewhere", "v.npy", "v.npy.json"]


# Provenance


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
    for unlink in (False, True):  # a sidecar without its file is in nobody's way
        write_vectors(np.ones((2, 4), np.float32), path, example_provenance())
        if unlink:
            path.unlink()
        encode_to_file(embedder, ROWS, path, force=not unlink)
        assert read_provenance(path) == provenance.provenance_of(embedder)
