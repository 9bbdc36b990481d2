"""Pooled files: onnxruntime alone gives the vectors that the Embedder gives."""

import numpy as np
import onnx
import pytest
from support import TEXTS, contents, random_token_ids, write_checkpoint
from tokenizers import Tokenizer

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import CheckpointError, VerificationError
from onnxsim_embed.export import export_model, verify_artifact
from onnxsim_embed.export.onnx import pooled as module
from onnxsim_embed.export.onnx.pooled import write_pooled
from onnxsim_embed.runtime.pooling import ACTIVATIONS, Dense, Head, PoolingMode
from onnxsim_embed.system.onnx_session import onnxruntime

pytestmark = pytest.mark.usefixtures("few_texts")


@pytest.fixture(scope="module")
def exported(few_texts, tmp_path_factory):
    """Every precision of a model with mean pooling, Dense and Normalize, and their pooled files."""
    home = tmp_path_factory.mktemp("pooled")
    checkpoint = write_checkpoint(home / "c", dense=True)
    return export_model(checkpoint, home / "a", precisions=["fp32", "int8", "fp16"], pooled=True)


def test_onnxruntime_alone_gives_the_vectors(exported):
    tokenizer = Tokenizer.from_file(str(exported.directory / "tokenizer.json"))
    tokenizer.enable_truncation(exported.manifest.max_seq_length)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(TEXTS)
    feed = {"input_ids": np.array([e.ids for e in encodings]),
            "attention_mask": np.array([e.attention_mask for e in encodings])}  # fmt: skip
    for precision, entry in exported.manifest.precisions.items():
        session = onnxruntime.InferenceSession(
            str(exported.directory / entry.pooled), providers=["CPUExecutionProvider"]
        )
        assert [o.name for o in session.get_outputs()] == [
            "sentence_embedding",
            "last_hidden_state",
        ]
        assert session.get_outputs()[0].shape == ["batch", 16]
        [vectors] = session.run(["sentence_embedding"], feed)
        reference = "fp32" if precision == "fp16" else precision
        expected = Embedder(exported, precision=reference, device="cpu").encode(TEXTS)
        bound = {"fp32": 1e-5, "int8": 0.02, "fp16": 0.02}[precision]
        assert np.abs(vectors - expected).max() < bound, precision
        assert exported.manifest.verification[precision]["pooled_min_cosine"] >= 0.999


def test_pooled_files_are_listed_and_checked(exported):
    names = {p: e.pooled for p, e in exported.manifest.precisions.items()}
    assert names == {"fp32": "onnx/model_pooled.onnx", "int8": "onnx/model_int8_pooled.onnx",
                     "fp16": "onnx/model_fp16_pooled.onnx"}  # fmt: skip
    card = (exported.directory / "README.md").read_text()
    for name in names.values():
        assert name in exported.manifest.files
        assert f"`{name}`" in card
    assert Artifact.open(exported.directory).manifest == exported.manifest
    assert verify_artifact(exported)["int8"]["pooled_min_cosine"] >= 0.999


@pytest.mark.parametrize("mode", [*PoolingMode, "cls+max+mean"])
def test_every_pooling_of_every_mask(exported, tmp_path, mode):
    modes = tuple(map(PoolingMode, str(getattr(mode, "value", mode)).split("+")))
    width = 32 * len(modes)
    rng = np.random.default_rng(0)
    dense = tuple(
        Dense((rng.standard_normal((width, width)) / 6).astype(np.float32), None, activation)
        for activation in ACTIVATIONS
    )
    source = exported.directory / "onnx/model.onnx"
    ids = random_token_ids(0, 5)
    mask = np.zeros((6, max(map(len, ids))), np.int64)
    tokens = np.zeros_like(mask)
    for row, own in enumerate(ids):  # padded on the right, and on the left; the last row is padding
        place = slice(len(own)) if row % 2 else slice(mask.shape[1] - len(own), None)
        tokens[row, place], mask[row, place] = own, 1
    for head in (Head(modes, (), False), Head(modes, dense, True)):
        write_pooled(source, tmp_path / "model.onnx", head, width)
        onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
        feed = {"input_ids": tokens, "attention_mask": mask}
        vectors, hidden = session.run(["sentence_embedding", "last_hidden_state"], feed)
        real = mask.any(axis=1) if PoolingMode.MAX in modes else slice(None)
        np.testing.assert_allclose(vectors[real], head(hidden, mask)[real], atol=2e-5)


def test_a_wrong_pooled_file_fails_the_export(checkpoint, tmp_path, monkeypatch):
    right = module.HeadBuilder.head
    wrong = Head((PoolingMode.MEAN,), (), normalizes=False)
    monkeypatch.setattr(module.HeadBuilder, "head", lambda b, head: right(b, wrong))
    with pytest.raises(VerificationError, match="fp32 vectors of the pooled file have other norms"):
        export_model(checkpoint, tmp_path / "a", precisions=["fp32"], pooled=True)
    assert contents(tmp_path) == {}


def test_an_old_opset_cannot_be_pooled(exported, tmp_path):
    model = onnx.load(exported.directory / "onnx/model.onnx")
    model.opset_import[0].version = 12
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match=r"opset 12.*needs 13"):
        write_pooled(tmp_path / "model.onnx", tmp_path / "p.onnx", Head((PoolingMode.CLS,)), 32)
