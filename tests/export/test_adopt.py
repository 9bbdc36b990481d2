"""Existing ONNX files: checked, described, copied."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import TEXTS, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.errors import ArtifactError, CheckpointError, VerificationError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.onnx import files as onnx_files
from onnxsim_embed.export.quantization.encoder import Quantizer

pytestmark = pytest.mark.usefixtures("few_texts")
FP32 = ["fp32"]
MODEL = "onnx/model.onnx"


@pytest.fixture
def foreign(artifact, tmp_path) -> Path:
    """A directory as an exporter leaves it: configuration, tokenizer and onnx/model.onnx."""
    directory = write_checkpoint(tmp_path / "foreign", prompts={"query": "a dog "})
    (directory / "model.safetensors").unlink()
    (directory / "onnx").mkdir()
    shutil.copyfile(artifact / MODEL, directory / MODEL)
    return directory


def edit(directory: Path, change) -> None:
    model = onnx.load(directory / MODEL)
    change(model)
    onnx.save(model, directory / MODEL)


def add_node(model, *arguments, **options) -> None:
    model.graph.node.append(helper.make_node(*arguments, **options))


def value(name: str, *axes, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, axes)


def assert_vectors_of(adopted: Artifact, artifact: Path) -> None:
    expected = Embedder(artifact, precision="fp32").encode(TEXTS)
    assert np.abs(Embedder(adopted, precision="fp32").encode(TEXTS) - expected).max() < 1e-6


def test_an_onnx_file_is_copied_unchanged(foreign, artifact, tmp_path):
    adopted = export_model(foreign, tmp_path / "a", precisions=FP32)
    manifest = adopted.manifest
    assert (manifest.via, manifest.dim, manifest.layers) == ("adopted", 32, 2)
    assert "onnx/model.onnx of the source" in manifest.precisions["fp32"].method
    assert (adopted.directory / MODEL).read_bytes() == (foreign / MODEL).read_bytes()
    report = manifest.verification["fp32"]
    assert (report["reference"], report["problems"]) == ("itself, padded", [])
    assert report["token_ids"]["reference"] == "transformers"
    assert_vectors_of(adopted, artifact)
    assert manifest.prompts == {"query": "a dog "}
    adopted.check()
    (foreign / MODEL).rename(foreign / "model.onnx")
    assert export_model(foreign, tmp_path / "b", precisions=FP32).manifest.via == "adopted"


def test_int8_and_fp16_are_derived_from_the_adopted_file(foreign, tmp_path):
    adopted = export_model(foreign, tmp_path / "a", precisions=["fp32", "int8", "fp16"])
    assert set(adopted.manifest.precisions) == {"fp32", "int8", "fp16"}
    int8 = adopted.manifest.precisions["int8"]
    assert int8.encoder is None
    # Query, key and value of a layer share one input.
    assert (len(int8.layers), int8.operators["MatMulIntegerToFloat"]) == (2 * 4, 2 * 6)
    assert adopted.manifest.verification["int8"]["mean_cosine"] >= 0.995
    assert adopted.manifest.verification["int8"]["batch_variant"] == 0
    files = adopted.manifest.files
    sizes = {k: files[e.file].size for k, e in adopted.manifest.precisions.items()}
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]


@pytest.mark.parametrize("via", ["direct", "adopt"])
def test_what_is_published_is_the_choice_and_not_a_trial_of_the_search(
    foreign, checkpoint, tmp_path, monkeypatch, via
):
    calls, quantize = [], Quantizer.__call__

    def record(self, choice, final):
        calls.append(final)
        return quantize(self, choice, final)

    monkeypatch.setattr(Quantizer, "__call__", record)
    source = foreign if via == "adopt" else checkpoint
    export_model(source, tmp_path / "a", via=via, int8_effort=0)
    assert calls == [False, True]


def test_weights_are_preferred_and_verify_an_adopted_file(foreign, checkpoint, tmp_path):
    shutil.copyfile(checkpoint / "model.safetensors", foreign / "model.safetensors")
    assert export_model(foreign, tmp_path / "a", precisions=FP32).manifest.via == "direct"
    adopted = export_model(foreign, tmp_path / "b", precisions=FP32, via="adopt").manifest
    assert (adopted.via, adopted.verification["fp32"]["reference"]) == ("adopted", "PyTorch")
    other = write_checkpoint(tmp_path / "other", seed=7)
    shutil.copyfile(other / "model.safetensors", foreign / "model.safetensors")
    with pytest.raises(VerificationError, match="fp32 is not faithful to PyTorch"):
        export_model(foreign, tmp_path / "c", precisions=FP32, via="adopt")


def add_pooled(model, name="pooled", keep_hidden=True) -> None:
    """Add a pooled output before the hidden states, or in their place; sentence-transformers' exports pool, too."""
    onnx_files.rename_value(model.graph, "last_hidden_state", "token_embeddings")
    add_node(model, "ReduceMean", ["token_embeddings"], [name], axes=[1], keepdims=0)
    if not keep_hidden:
        del model.graph.output[:]
    model.graph.output.insert(0, value(name, "batch", 32))


def add_position_ids(model):
    model.graph.input.append(value("position_ids", "batch", "sequence", kind=TensorProto.INT64))


def take_int32(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def quantize_dynamically(model):
    add_node(model, "DynamicQuantizeLinear", ["last_hidden_state"], ["q", "scale", "zero"])


def ignore_the_mask(model):
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] == "attention_mask":
            node.input[0] = "ones"
            break
    one = helper.make_tensor("one.int64", TensorProto.INT64, [1], [1])
    shape = helper.make_node("Shape", ["attention_mask"], ["mask.shape"])
    ones = helper.make_node("ConstantOfShape", ["mask.shape"], ["ones"], value=one)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([shape, ones, *nodes])


def test_hidden_states_become_the_first_output(foreign, artifact, tmp_path):
    edit(foreign, add_pooled)
    adopted = export_model(foreign, tmp_path / "a", precisions=FP32)
    outputs = [entry.name for entry in onnx.load(adopted.directory / MODEL).graph.output]
    assert outputs == ["last_hidden_state", "pooled"]
    assert_vectors_of(adopted, artifact)


def give_inner_states_too(model):
    inner = next(n for n in model.graph.node if n.op_type == "LayerNormalization").output[0]
    onnx_files.rename_value(model.graph, "last_hidden_state", "encoded")
    model.graph.output.insert(0, value(inner, "batch", "sequence", 32))


def give_logits(model, name="logits"):
    head = np.ones((32, 100), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(head, "head"))
    onnx_files.rename_value(model.graph, "last_hidden_state", "encoded")
    add_node(model, "MatMul", ["encoded", "head"], [name])
    del model.graph.output[:]
    classes = "classes" if name == "logits" else 100
    model.graph.output.append(value(name, "batch", "sequence", classes))


def test_a_graph_s_own_sentence_embedding_is_compared(foreign, tmp_path):
    edit(foreign, partial(add_pooled, name="sentence_embedding"))
    artifact = export_model(foreign, tmp_path / "a", precisions=FP32)
    assert artifact.manifest.verification["fp32"]["problems"] == []
    with pytest.raises(VerificationError, match="sentence_embedding"):
        export_model(foreign, tmp_path / "b", precisions=FP32, pooling="cls")


def test_several_hidden_states_are_listed_and_one_chosen_by_name(
    foreign, artifact, tmp_path, reject
):
    edit(foreign, give_inner_states_too)
    with pytest.raises(CheckpointError, match=r"found 2; .*embeddings .*encoded.*onnx_output=NAME"):
        export_model(foreign, tmp_path / "a", precisions=FP32)
    exported = export_model(foreign, tmp_path / "a", precisions=FP32, onnx_output="encoded")
    assert_vectors_of(exported, artifact)
    options = ["--onnx-output", "nothing", "--precision", "fp32"]
    assert "--onnx-output NAME" in reject("export", foreign, "-o", tmp_path / "b", *options, code=1)
    name = "last_hidden_state"
    edit(foreign, lambda model: onnx_files.rename_value(model.graph, "embeddings", name))
    again = export_model(foreign, tmp_path / "c", precisions=FP32, onnx_output="encoded")
    assert np.array_equal(Embedder(again).encode(TEXTS), Embedder(exported).encode(TEXTS))
    with pytest.raises(ValueError, match="adopt"):
        export_model(artifact, tmp_path / "b", via="direct", onnx_output="encoded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(add_pooled, keep_hidden=False), "pooled"),
        (give_logits, "100"),
        (partial(give_logits, name="last_hidden_state"), "100"),
        (add_position_ids, "position_ids"),
        (take_int32, "input_ids .*INT32"),
        (quantize_dynamically, "quantized dynamically"),
    ],
)
def test_a_file_with_another_interface_is_rejected(foreign, tmp_path, change, message):
    edit(foreign, change)
    with pytest.raises(CheckpointError, match=message):
        export_model(foreign, tmp_path / "a", precisions=FP32)
    assert not (tmp_path / "a").exists()


def test_a_file_whose_vectors_change_with_padding_is_rejected(foreign, tmp_path):
    edit(foreign, ignore_the_mask)
    with pytest.raises(VerificationError, match="fp32 is not faithful to itself, padded"):
        export_model(foreign, tmp_path / "a", precisions=FP32)


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x00" * 100, None])
def test_a_damaged_file_is_named(foreign, tmp_path, content):
    if content is None:  # names of nodes that are not UTF-8
        content = (foreign / MODEL).read_bytes()
        content = content.replace(b"layer0.up.product", b"layer0.up.produc\xff")
    (foreign / MODEL).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.onnx is not a readable ONNX file"):
        export_model(foreign, tmp_path / "a", precisions=FP32)


def test_a_directory_without_weights_and_onnx_names_both(foreign, tmp_path):
    (foreign / MODEL).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        export_model(foreign, tmp_path / "a", precisions=FP32)
    with pytest.raises(CheckpointError, match=r"has no ONNX file: .*onnx/model\.onnx"):
        export_model(foreign, tmp_path / "a", precisions=FP32, via="adopt")


# External weights


def point_to(directory: Path, location: str = "model.onnx_data", move: bool = True) -> None:
    """Move the weights to a file beside the graph, or change the location that it names."""
    path = directory / MODEL
    model = onnx.load(path, load_external_data=move)
    if move:
        options = {"location": location, "size_threshold": 256}
        onnx.save(model, path, save_as_external_data=True, **options)
        return
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def test_external_weights_are_copied_and_checked(foreign, artifact, tmp_path):
    point_to(foreign)
    adopted = export_model(foreign, tmp_path / "a")
    entry = adopted.manifest.precisions["fp32"]
    assert entry.data == ("onnx/model.onnx_data",)
    assert set(adopted.manifest.precisions) == {"fp32", "int8"}
    assert_vectors_of(adopted, artifact)
    with (adopted.directory / entry.data[0]).open("r+b") as stream:
        stream.write(b"damage")
    with pytest.raises(ArtifactError, match=r"model\.onnx_data is damaged"):
        Embedder(Artifact.open(adopted.directory), precision="fp32")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/file", "..", "a\\b", ""])
def test_external_weights_in_another_directory_are_rejected(foreign, tmp_path, location):
    point_to(foreign)
    (foreign / "secret").write_bytes(b"x" * 100_000)
    point_to(foreign, location, move=False)
    with pytest.raises(CheckpointError, match="only files in its own directory"):
        export_model(foreign, tmp_path / "a", precisions=FP32)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_missing_file_or_a_link_that_leads_out_is_named(foreign, tmp_path, name):
    point_to(foreign)
    outside = tmp_path / "outside"
    (foreign / "onnx" / name).rename(outside)
    with pytest.raises(CheckpointError, match=name if "data" in name else "weights"):
        export_model(foreign, tmp_path / "a", precisions=FP32)
    (foreign / "onnx" / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"is a link to .*outside"):
        export_model(foreign, tmp_path / "a", precisions=FP32)


def test_a_model_too_large_for_one_file_is_written_as_two(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MAX_FILE_BYTES", 1000)
    adopted = export_model(foreign, tmp_path / "a", precisions=["fp32", "int8", "fp16"])
    assert adopted.manifest.precisions["fp32"].data == ()
    for name in ("int8", "fp16"):
        assert adopted.manifest.precisions[name].data == (f"onnx/model_{name}.onnx_data",)
    assert Embedder(adopted, precision="int8").encode(TEXTS).shape == (len(TEXTS), 32)
