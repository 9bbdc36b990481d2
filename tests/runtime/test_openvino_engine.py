"""OpenVINO under the run path: the same files, three precisions, no dependence on the batch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support import TEXTS

from onnxsim_embed import Embedder
from onnxsim_embed.errors import ArtifactError, MissingExtraError, OnnxsimEmbedError
from onnxsim_embed.runtime import engine, openvino_engine
from onnxsim_embed.runtime.openvino_engine import OpenVINOEngine
from onnxsim_embed.runtime.session import Session
from onnxsim_embed.system.hardware import bf16_supported

BF16, REASON = bf16_supported()
TEXTS_OF_ALL_LENGTHS = [f"{'water road ' * (n // 2)}{'city' * (n % 2)}" for n in range(1, 46)]


@pytest.fixture
def openvino():
    if find_spec("openvino") is None:
        pytest.skip("the extra openvino is not installed")


@pytest.fixture
def load(openvino, artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / "cache"))
    return lambda **arguments: Embedder(artifact, threads=2, **arguments)


@pytest.mark.parametrize(
    ("precision", "cosine"),
    [("fp32", 1 - 1e-6), ("int8", 0.98),
     pytest.param("bf16", 0.999, marks=pytest.mark.skipif(not BF16, reason=REASON))],
)  # fmt: skip
def test_vectors(load, monkeypatch, precision, cosine):
    monkeypatch.setattr(engine, "LONE_SECONDS", 0.0)
    model = load(precision=precision, engine="auto" if precision == "bf16" else "openvino")
    assert (model.precision, model.provider[:9]) == (precision, "OpenVINO ")
    vectors = model.encode(TEXTS_OF_ALL_LENGTHS)
    reference = load(precision="fp32").encode(TEXTS_OF_ALL_LENGTHS)
    assert np.einsum("ij,ij->i", vectors, reference).min() > cosine
    alone = np.stack([model.encode(text) for text in TEXTS_OF_ALL_LENGTHS])
    np.testing.assert_array_equal(alone, vectors)
    assert model._pipeline._lone.second is not None
    with ThreadPoolExecutor(4) as workers:
        for same in workers.map(model.encode, [TEXTS_OF_ALL_LENGTHS] * 4):
            np.testing.assert_array_equal(same, vectors)
    copy = pickle.loads(pickle.dumps(model))
    assert (copy.provider, copy.precision) == (model.provider, precision)
    np.testing.assert_array_equal(copy.encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("name", ["model.onnx", "model_int8.onnx"])
def test_padding(openvino, artifact, tmp_path, name):
    file = artifact / "onnx" / name
    ids = np.array([[2, 9, 10, 3], [2, 11, 12, 3]], np.int64)
    padded, mask = np.pad(ids, ((0, 0), (0, 3))), np.pad(np.ones_like(ids), ((0, 0), (0, 3)))
    model = OpenVINOEngine(file, 6, tmp_path, "fp32", 1)
    expected = Session(file, "cpu").run(ids)
    within = 0.1 if "int8" in name else 1e-4
    np.testing.assert_allclose(model.run(ids), expected, atol=within)
    np.testing.assert_allclose(model.run(padded, mask)[:, :4], expected, atol=within)


def test_batches_have_few_shapes(openvino, artifact, tmp_path):
    model = OpenVINOEngine(artifact / "onnx" / "model.onnx", 40, tmp_path, "fp32", 1)
    padded = [model._pad(np.ones((2, tokens), np.int64), None) for tokens in range(1, 43)]
    assert {ids.shape for ids, _ in padded} == {(2, n) for n in (16, 32, 40, 41, 42)}
    assert [mask.sum() for _, mask in padded] == [2 * tokens for tokens in range(1, 43)]


def test_what_was_compiled_is_kept_and_made_again_where_it_is_damaged(load, tmp_path):
    def compiled():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.blob")}

    expected, before = load(precision="fp32", engine="openvino").encode(TEXTS), compiled()
    (kept,) = before
    again = load(precision="fp32", engine="openvino")
    assert compiled() == before
    np.testing.assert_array_equal(again.encode(TEXTS), expected)
    content = kept.read_bytes()
    kept.unlink()  # it is read-only
    kept.write_bytes(content[: len(content) // 2])
    again = load(precision="fp32", engine="openvino")
    np.testing.assert_array_equal(again.encode(TEXTS), expected)


@pytest.mark.parametrize("name", ["model.onnx", "model_int8.onnx"])
def test_a_token_id_beyond_the_embeddings(openvino, artifact, tmp_path, name):
    with pytest.raises(ArtifactError, match="token id 5000"):
        OpenVINOEngine(artifact / "onnx" / name, 64, tmp_path, "fp32", 1).run(np.array([[5000, 2]]))


def test_a_damaged_file(openvino, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no onnx at all" * 9)
    with pytest.raises(ArtifactError, match=r"OpenVINO cannot load .*model\.onnx"):
        OpenVINOEngine(tmp_path / "model.onnx", 64, tmp_path, "fp32", 1)


@pytest.mark.parametrize("exists", [False, True])
def test_a_cache_that_cannot_be_written(load, monkeypatch, tmp_path, caplog, exists):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONNXSIM_EMBED_CACHE", str(tmp_path / ("cache" if exists else "file")))
    monkeypatch.setattr(os, "access", lambda path, mode: not exists)
    with caplog.at_level("INFO"):
        assert load(precision="fp32", engine="openvino").encode(TEXTS).shape == (len(TEXTS), 32)
    assert "at each start" in caplog.text


def test_processes_that_start_together(load, tmp_path, monkeypatch):
    """Only one writes the cache; and only one thread makes the first array that OpenVINO sees."""
    import openvino

    seen = []

    class Lock(openvino_engine.FileLock):
        def __exit__(self, *raised):
            seen.append([path.suffix for path in Path(self.lock_file).parent.glob("*.blob")])
            super().__exit__(*raised)

    def tensor(*arguments, **options):
        seen.append(openvino_engine._starting.locked())
        return made(*arguments, **options)

    made = openvino.Tensor
    monkeypatch.setattr(openvino, "Tensor", tensor)
    monkeypatch.setattr(openvino_engine, "FileLock", Lock)
    openvino_engine._core.cache_clear()
    load(precision="fp32", engine="openvino")
    assert seen == [True, [".blob"]]


IMPORT = """
import sys
from onnxsim_embed.runtime.openvino_engine import _core
_core()
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__, "openvino_telemetry" in sys.modules)
"""


def test_nothing_is_reported(openvino):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "False"]


def test_a_forked_child(load, monkeypatch):
    model = load(precision="fp32", engine="openvino")
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(OnnxsimEmbedError, match="spawn"):
        model.encode(TEXTS)


@pytest.mark.parametrize(
    "arguments",
    [{"engine": "tensorrt"}, {"engine": "onnxruntime", "precision": "bf16"},
     {"engine": "openvino", "device": "cuda"}, {"precision": "bf16", "device": ["CPU"]},
     {"engine": "openvino", "precision": "fp16"}],
)  # fmt: skip
def test_what_engines_do_not_have(artifact, arguments):
    with pytest.raises(ValueError, match=r"engine|OpenVINO|fp16"):
        Embedder(artifact, **arguments)


def test_without_openvino(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino_engine._core.cache_clear()
    with pytest.raises(MissingExtraError, match="openvino"):
        Embedder(artifact, engine="openvino")
