"""The weight precision that is loaded: by machine, provider and request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnxsim_embed import Embedder
from onnxsim_embed.artifact import precision
from onnxsim_embed.artifact.manifest import Artifact, PrecisionEntry
from onnxsim_embed.artifact.precision import choose_precision
from onnxsim_embed.system import hardware

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SATURATING, VNNI = ("x86_64", "avx2 fma"), ("x86_64", "avx2 avx512_vnni")


@pytest.fixture
def on(tmp_path, monkeypatch):
    """A function that fakes the machine."""

    def fake(architecture, flags):
        monkeypatch.setattr("platform.machine", lambda: architecture)
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
        monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")

    precision._warn_once.cache_clear()
    yield fake
    precision._warn_once.cache_clear()


def with_precisions(artifact, *names) -> Artifact:
    opened = Artifact.open(artifact)
    entry = PrecisionEntry("onnx/model.onnx", None, "", {})
    entries = dict.fromkeys(names, entry)
    return Artifact(artifact, replace(opened.manifest, precisions=entries))


@pytest.mark.parametrize(
    ("machine", "chosen"), [(VNNI, "int8"), (("arm64", "fp"), "int8"), (SATURATING, "fp32")]
)
def test_auto_chooses_int8_where_it_is_exact(on, artifact, caplog, machine, chosen):
    on(*machine)
    assert Embedder(artifact).precision == chosen
    assert len(caplog.records) == (chosen == "fp32")


def test_int8_on_request_warns_once_where_it_saturates(on, artifact, caplog):
    on(*VNNI)
    assert choose_precision(Artifact.open(artifact), "int8") == "int8"
    assert caplog.messages == []
    precision._warn_once.cache_clear()
    on(*SATURATING)
    for _ in range(2):
        assert Embedder(artifact, precision="int8").precision == "int8"
    [message] = caplog.messages
    assert "VNNI" in message
    assert "precision='auto'" in message


@pytest.mark.parametrize(
    ("held", "provider", "chosen"),
    [(("fp32",), CPU, "fp32"), (("fp32", "fp16"), CPU, "fp32"), (("fp32", "fp16"), CUDA, "fp16"),
     (("fp32", "int8"), CUDA, "fp32"), (("fp32", "int8"), "OpenVINOExecutionProvider", "fp32")],
)  # fmt: skip
def test_auto_chooses_by_provider_without_a_warning(on, artifact, caplog, held, provider, chosen):
    on(*VNNI)
    assert choose_precision(with_precisions(artifact, *held), "auto", provider) == chosen
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "provider", "message"),
    [("fp64", CPU, "allowed are auto, fp32, int8, fp16"), ("int8", CUDA, "device='cpu'"),
     ("fp16", CPU, "device='cuda'"), ("fp16", "OpenVINOExecutionProvider", "device='cuda'")],
)  # fmt: skip
def test_an_unsuitable_precision_is_an_error_with_the_next_step(artifact, name, provider, message):
    held = with_precisions(artifact, "fp32", "int8", "fp16")
    with pytest.raises(ValueError, match=message):
        choose_precision(held, name, provider)
    with pytest.raises(ValueError, match=r"precisions=\['fp32', 'int8'\] and force=True"):
        choose_precision(with_precisions(artifact, "fp32"), "int8")


@pytest.mark.parametrize(
    ("flags", "has"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)]
)
def test_bf16_needs_a_processor_that_has_it(on, artifact, flags, has):
    on("x86_64", flags)
    if has:
        assert choose_precision(Artifact.open(artifact), "bf16") == "bf16"
        return
    with pytest.raises(ValueError, match="neither avx512_bf16 nor amx_bf16"):
        choose_precision(Artifact.open(artifact), "bf16")
