"""Pipeline: windows, repeated texts, lone batches, padded batches, forks, failures."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.parser import parse_model
from onnx.printer import to_text
from support import TEXTS, sentence_transformer

import onnxsim_embed
from onnxsim_embed import Embedder
from onnxsim_embed.runtime import cuda as cuda_engine
from onnxsim_embed.runtime import engine, pipeline
from onnxsim_embed.runtime.batching import GPU_CALLERS
from onnxsim_embed.runtime.cuda import CudaSession
from onnxsim_embed.runtime.options import RANGED
from onnxsim_embed.runtime.postprocess import quantize_vectors
from onnxsim_embed.runtime.session import Session

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PRECISIONS = ("fp32", "int8")
LENGTHS = [f"{'water road ' * (n // 2)}{'city' * (n % 2)}" for n in range(1, 46)]


@pytest.fixture
def model(artifact):
    return Embedder(artifact, precision="fp32", threads=2)


# lone batches


@pytest.mark.parametrize(
    ("seconds", "threads", "made"),
    [(60.0, 2, [1]), (0.0, 16, [1, engine.LONE_THREADS]), (0.0, 1, [1]), (0.0, None, [1])],
    ids=["short texts", "long texts", "one thread", "one processor"],
)
def test_repeated_long_texts_get_a_second_engine_once(
    artifact, monkeypatch, seconds, threads, made
):
    session = Mock(side_effect=Session)
    monkeypatch.setattr("onnxsim_embed.runtime.loading.Session", session)
    monkeypatch.setattr(engine, "LONE_SECONDS", seconds)
    monkeypatch.setattr("onnxsim_embed.runtime.loading.available_cpus", lambda: 1)
    model = Embedder(artifact, threads=threads)
    for _ in range(3 * engine.LONE_CALLS):
        model.encode("water road")
    assert [call.args[-1] for call in session.call_args_list] == made  # threads inside a call


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "model", ["artifact", pytest.param("real_artifact", marks=pytest.mark.real)]
)
def test_a_vector_is_the_same_from_either_engine(request, monkeypatch, model, precision):
    model = Embedder(request.getfixturevalue(model), precision=precision, threads=2)
    expected = model.encode(LENGTHS)
    monkeypatch.setattr(engine, "LONE_SECONDS", 0.0)
    monkeypatch.setattr(engine, "LONE_CALLS", 0)
    model.encode("x")
    for text, vector in zip(LENGTHS, expected, strict=True):
        np.testing.assert_array_equal(model.encode(text), vector)
    assert model._pipeline._lone.second is not None


# threads


def test_several_threads_with_lone_and_many_texts_at_once(artifact, monkeypatch):
    monkeypatch.setattr(engine, "LONE_SECONDS", 0.0)
    model = Embedder(artifact, threads=2)
    expected = model.encode(TEXTS)

    def work(number):
        if number % 2:
            return model.encode(TEXTS)
        return np.stack([model.encode(text) for text in TEXTS])

    with ThreadPoolExecutor(8) as workers:
        for result in workers.map(work, range(16)):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_encodes(artifact):
    """In a process of its own, because pytest has threads that a fork would inherit."""
    code = """
import os, sys
from onnxsim_embed import Embedder
from onnxsim_embed.runtime import engine
engine.LONE_SECONDS, engine.LONE_CALLS = 0.0, 0
model = Embedder(sys.argv[1], threads=2)
texts = [f"water {'road ' * n}" for n in range(40)]
expected, one = model.encode(texts), [model.encode("a road") for _ in range(3)][-1]
child = os.fork()
if child == 0:
    same = (model.encode(texts) == expected).all() and (model.encode("a road") == one).all()
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, artifact]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "0", done.stderr


# windows


def test_each_array_of_a_stream_is_full_but_the_last(model, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 8)
    texts = [f"road {number % 5}" for number in range(19)]
    blocks = list(model.encode_stream(iter(texts)))
    assert [len(block) for block in blocks] == [8, 8, 3]
    expected = np.stack([model.encode(text) for text in texts])
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    np.testing.assert_array_equal(model.encode(texts), expected)


@pytest.mark.parametrize("precision", ["float16", "binary", "int8", "uint8"])
def test_every_method_converts(model, precision):
    vectors, ranges = model.encode(TEXTS), None
    if precision in RANGED:
        own = model.encode(TEXTS, precision=precision)  # with the ranges of these vectors
        np.testing.assert_array_equal(own, quantize_vectors(vectors, precision), strict=True)
        ranges = np.stack([vectors[::2].min(axis=0), vectors[::2].max(axis=0)])
    options = {"precision": precision, "ranges": ranges}
    for method in (model.encode, model.encode_query, model.encode_document):
        expected = quantize_vectors(method(TEXTS), **options)
        np.testing.assert_array_equal(method(TEXTS, **options), expected, strict=True)
        np.testing.assert_array_equal(method(TEXTS[3], **options), expected[3], strict=True)
    (stream,) = model.encode_stream(TEXTS, **options)
    np.testing.assert_array_equal(stream, quantize_vectors(vectors, **options), strict=True)


def test_a_stream_needs_ranges_and_they_must_fit(model):
    with pytest.raises(ValueError, match=r"ranges here: an array \(2, 32\)"):
        model.encode_stream(TEXTS, precision="int8")
    with pytest.raises(ValueError, match=r"ranges must have shape \(2, 32\), got \(2, 31\)"):
        model.encode(TEXTS, precision="uint8", ranges=np.zeros((2, 31)))


# token embeddings


@pytest.mark.parametrize("prompt", [None, "about: "])
def test_token_embeddings_equal_those_of_sentence_transformers(model, checkpoint, prompt):
    expected = sentence_transformer(checkpoint).encode(
        TEXTS, prompt=prompt, output_value="token_embeddings"
    )
    result = model.encode(TEXTS, prompt=prompt, output_value="token_embeddings")
    assert len(result) == len(TEXTS)
    for ours, other in zip(result, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, other.numpy(), atol=1e-5)
    one = model.encode(TEXTS[0], prompt=prompt, output_value="token_embeddings")
    np.testing.assert_array_equal(one, result[0])


# padded batches


@pytest.fixture
def cuda(monkeypatch):
    """An onnxruntime that offers CUDA and computes on the CPU; the list of its inputs."""
    fed = []

    class OnCuda(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            assert providers[0] == CUDA
            super().__init__(path, options, [CPU])

        def get_providers(self):
            return [CUDA, CPU]

    def execute(self, feed, *rest):
        fed.append(feed)
        return run(self, feed, *rest)

    run = CudaSession._execute
    monkeypatch.setattr(CudaSession, "_execute", execute)
    monkeypatch.setattr(cuda_engine, "MEMORY", "cpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnCuda)
    return fed


@pytest.mark.parametrize("device", ["auto", "cuda", [CUDA, CPU]])
def test_a_gpu_gets_large_padded_batches_of_the_portable_file(artifact, cuda, device):
    model = Embedder(artifact, device=device, threads=2)
    assert (model.precision, model.provider) == ("fp32", CUDA)
    vectors = model.encode(TEXTS)
    assert len(cuda) == 1  # all texts in one batch
    ids, mask = cuda[0]["input_ids"], cuda[0]["attention_mask"]
    assert ids.shape == mask.shape == (len(dict.fromkeys(TEXTS)), 48)
    assert (ids[mask == 0] == 0).all()
    lengths = [len(tokens) for tokens in model.token_ids(list(dict.fromkeys(TEXTS)))]
    assert sorted(mask.sum(axis=1)) == sorted(lengths)
    assert model.last_report.provider == CUDA
    expected = Embedder(artifact, precision="fp32", device=[CUDA]).encode(TEXTS)
    np.testing.assert_array_equal(vectors, expected)


def test_padded_vectors_are_those_of_the_cpu_within_rounding(artifact, cuda, monkeypatch):
    padded = Embedder(artifact, device="cuda")
    vectors, tokens = padded.encode(TEXTS), padded.encode(TEXTS, output_value="token_embeddings")
    alone = np.stack([padded.encode(text) for text in TEXTS])
    monkeypatch.undo()
    model = Embedder(artifact, precision="fp32", device="cpu")
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(alone, vectors, atol=1e-5)
    for ours, other in zip(
        tokens, model.encode(TEXTS, output_value="token_embeddings"), strict=True
    ):
        np.testing.assert_allclose(ours, other, atol=1e-5)


def test_fp16_runs_in_the_layout_of_gpus(half, cuda, monkeypatch):
    model = Embedder(half, device="cuda")
    assert (model.precision, model.threads) == ("fp16", GPU_CALLERS)
    vectors = model.encode(TEXTS)
    assert set(cuda[0]) == {"input_ids", "key_lengths"}
    rows, tokens = cuda[0]["input_ids"].shape
    lengths = cuda[0]["key_lengths"]
    assert lengths.dtype == np.int32
    assert len(lengths) == 3 * rows + 2
    assert (np.diff(lengths[rows : 2 * rows + 1]) == tokens).all()
    monkeypatch.undo()
    expected = Embedder(half, precision="fp32", device="cpu").encode(TEXTS)
    assert (vectors * expected).sum(axis=1).min() > 0.9999


def test_the_pooling_of_gpus_is_one_product():
    expected = parse_model("""
        <ir_version: 8, opset_import: ["" : 17], producer_name: "onnxsim-embed">
        pooling (float[batch,modes,tokens] weights, float[batch,tokens,size] hidden)
            => (float[batch,modes,size] pooled)
        { pooled = MatMul(weights, hidden) }
    """)
    shipped = onnx.load(Path(onnxsim_embed.__file__).parent / "data/pooling.onnx")
    assert to_text(shipped) == to_text(expected)


# failures


@pytest.mark.parametrize(
    "text",
    ["water road. " * 900_000, "\0" * 3_000_000, "漢" * 3_000_000],
    ids=["words", "NUL", "Chinese"],
)
def test_a_text_of_megabytes_is_encoded(model, text):
    result = model.encode(["a road", text, "water"])
    np.testing.assert_array_equal(result[[0, 2]], model.encode(["a road", "water"]))
    assert np.isfinite(result).all()


def test_a_generator_that_raises_midway_loses_nothing(model, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 4)

    def texts():
        yield from [f"road {number}" for number in range(10)]
        raise RuntimeError("the source is gone")

    stream = model.encode_stream(texts())
    blocks = [next(stream) for _ in range(3)]  # nothing that was read is lost
    expected = model.encode([f"road {number}" for number in range(10)])
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    for failing in (lambda: next(stream), lambda: model.encode(texts())):
        with pytest.raises(RuntimeError, match="the source is gone"):
            failing()


def test_an_embedder_leaves_no_thread_behind(artifact):
    before = set(threading.enumerate())
    model = Embedder(artifact, threads=3)
    model.encode([f"road {'water ' * (number % 9)}" for number in range(500)])
    started = set(threading.enumerate()) - before
    assert started
    del model
    gc.collect()
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)
