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

from onnxsim_embed import Embedder
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.runtime.session import Session, resolve_providers

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("cpu", [CUDA, CPU], [CPU]),
        ("auto", ["AzureExecutionProvider", CPU], [CPU]),
        ("auto", [CUDA, CPU], [CUDA, CPU]),
        ("cuda:0", [CUDA, CPU], [CUDA, CPU]),
        ("cuda:1", [CUDA, CPU], [(CUDA, {"device_id": "1"}), CPU]),
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

    def on_cpu(path, options, providers):
        return session(path, options, [CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", [CUDA, CPU], [(CUDA, {}), CPU]])
def test_cuda_that_becomes_cpu_raises(cuda_that_fails, artifact, device):
    with pytest.raises(ValueError, match=f"the session runs on {CPU}"):
        Session(artifact / "onnx/model.onnx", device)


def test_auto_warns_and_uses_the_cpu(cuda_that_fails, artifact, caplog):
    model = Embedder(artifact)
    assert model.provider == CPU
    assert model._pipeline.engine._path.name == "encoder_int8.onnx"  # the run path's own file
    assert f"using the CPU: {CUDA} could not be started" in caplog.text
    assert model.encode("a road").shape == (32,)


@pytest.mark.parametrize("content", [b"", b"no onnx at all" * 9])
def test_a_damaged_model_is_named(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"onnxruntime cannot load .*model\.onnx"):
        Session(tmp_path / "model.onnx", "cpu")


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
    code = ["-W", "ignore", "-c", EXPORT_ENCODE_AND_COMPARE]
    command = [sys.executable, *code, checkpoint, artifact]
    if shutil.which("strace") and value is None:
        command = ["strace", "-f", "-e", "trace=connect", "-o", trace, *command]
    options = {"env": environment, "cwd": tmp_path, "timeout": 240, "text": True}
    done = subprocess.run(command, check=True, capture_output=True, **options)
    assert done.stdout.split()[-1] == (value or "1")
    if value is None:
        assert not trace.exists() or "AF_INET" not in trace.read_text()
        assert not list((tmp_path / "cache").rglob("onnxruntime.db"))
