"""Providers of a device, and sessions; no fallback is silent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.session import Session, resolve_providers

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
IDS = np.array([[2, 9, 10, 3], [2, 11, 12, 3]], np.int64)


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("cpu", [CUDA, CPU], [CPU]),
        ("auto", [CPU], [CPU]),
        ("auto", ["AzureExecutionProvider", CPU], [CPU]),
        ("auto", [CUDA, CPU], [CUDA, CPU]),
        ("cuda", [CUDA, CPU], [CUDA, CPU]),
        ("cuda:0", [CUDA, CPU], [CUDA, CPU]),
        ("cuda:1", [CUDA, CPU], [(CUDA, {"device_id": "1"}), CPU]),
        ([CPU], [CUDA, CPU], [CPU]),
        ([(CUDA, {"device_id": 3}), CPU], [CUDA, CPU], [(CUDA, {"device_id": 3}), CPU]),
    ],
)
def test_providers_of_a_device(device, available, expected):
    assert resolve_providers(device, available) == expected


@pytest.mark.parametrize("device", ["gpu", "", "CPU", "cuda:", "cuda:-1", "cuda 1", "openvino"])
def test_an_unknown_device_lists_the_known_ones(device):
    with pytest.raises(ValueError, match=r"allowed are auto, cpu, .* engine='openvino'"):
        resolve_providers(device, [CUDA, CPU])


@pytest.mark.parametrize(
    ("device", "advice"),
    [("cuda", r"onnxruntime-gpu\[cuda,cudnn\]', or"), ("cuda:0", "uninstall -y onnxruntime && "),
     (["TensorrtExecutionProvider", CPU], ""),
     ([(CUDA, {"device_id": 0})], ""), ([], "")],
)  # fmt: skip
def test_an_unavailable_provider_is_an_error_with_advice(device, advice):
    with pytest.raises(ValueError, match=rf"this onnxruntime offers \['{CPU}'\].*{advice}"):
        resolve_providers(device, [CPU])


@pytest.fixture
def cuda_that_fails(monkeypatch):
    """An onnxruntime that offers CUDA and takes the CPU, as the real one does without a driver."""
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, [CPU]),
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:1", [CUDA, CPU], [(CUDA, {}), CPU]])
def test_cuda_that_becomes_cpu_raises(cuda_that_fails, artifact, device):
    with pytest.raises(ValueError, match=f"the session runs on {CPU}"):
        Session(artifact / "onnx/model.onnx", device)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_device_that_allows_the_cpu_uses_it(cuda_that_fails, artifact, device):
    assert Session(artifact / "onnx/model.onnx", device).provider == CPU


@pytest.mark.parametrize("content", [b"", b"no onnx at all" * 9])
def test_a_damaged_model_is_named(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"onnxruntime cannot load .*model\.onnx"):
        Session(tmp_path / "model.onnx", "cpu")


def test_masked_tokens_do_not_change_the_others(artifact):
    session = Session(artifact / "onnx/model.onnx", "cpu")
    hidden = session.run(IDS)
    assert (hidden.shape, hidden.dtype) == ((2, 4, 32), np.float32)
    padded = np.pad(IDS, ((0, 0), (0, 3)))
    mask = np.pad(np.ones_like(IDS), ((0, 0), (0, 3)))
    np.testing.assert_allclose(session.run(padded, mask)[:, :4], hidden, atol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "encoder.onnx", "encoder_int8.onnx"])
def test_a_token_id_beyond_the_embeddings_is_an_error_with_both_numbers(artifact, name):
    size = json.loads((artifact / "config.json").read_text())["vocab_size"]
    with pytest.raises(ArtifactError, match=rf"{name} on token ids up to {size}.*,{size - 1}\]"):
        Session(artifact / "onnx" / name, "cpu").run(np.array([[size, 2]]))


EXPORT_ENCODE_AND_COMPARE = """
import os, sys, time
from onnxsim_embed import Embedder, similarity_matrix
end = time.monotonic() + 3  # telemetry starts about a second after the import
if os.environ.get("ORT_DISABLE_TELEMETRY") is None:
    from onnxsim_embed.export import export_model
    export_model(sys.argv[1], "exported")
    model = Embedder("exported")
else:
    model = Embedder(sys.argv[2])
print(os.environ["ORT_DISABLE_TELEMETRY"])
while time.monotonic() < end:
    similarity_matrix(model.encode(["a road", "the river"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the paths are those of Linux")
@pytest.mark.parametrize("value", [None, "0"], ids=["default", "enabled by the user"])
def test_nothing_opens_a_connection_or_writes_telemetry(checkpoint, artifact, tmp_path, value):
    ours = ("ORT_DISABLE_TELEMETRY", "HF_HUB_OFFLINE")
    environment = {name: text for name, text in os.environ.items() if name not in ours}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {} if value is None else {"ORT_DISABLE_TELEMETRY": value}
    trace = tmp_path / "trace"
    paths = str(checkpoint), str(artifact)
    command = [sys.executable, "-W", "ignore", "-c", EXPORT_ENCODE_AND_COMPARE, *paths]
    if shutil.which("strace") and value is None:
        command = ["strace", "-f", "-e", "trace=connect", "-o", str(trace), *command]
    done = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1] == (value or "1")
    if value is None:
        assert not trace.exists() or "AF_INET" not in trace.read_text()
        assert not list((tmp_path / "cache").rglob("onnxruntime.db"))
