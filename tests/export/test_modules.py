"""Modules of a Sentence-Transformers directory: pooling schemas, order, Dense."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import change_json, write_checkpoint, write_json

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.modules import read_dense, read_modules


def change_modules(directory: Path, *modules: tuple[str, str]) -> None:
    """Write modules.json; a kind with a dot is a whole class name."""
    entries = [
        {"idx": i, "name": str(i), "path": path,
         "type": kind if "." in kind else f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]  # fmt: skip
    write_json(directory / "modules.json", entries)


@pytest.mark.parametrize(
    ("schema", "order"), [("legacy", ["cls", "max", "mean"]), ("new", ["mean", "cls", "max"])]
)
def test_a_list_of_modes_has_an_order_and_booleans_have_theirs(tmp_path, schema, order):
    directory = write_checkpoint(tmp_path / "c", pooling="mean+cls+max", schema=schema)
    assert [mode.value for mode in read_modules(directory).pooling] == order


@pytest.mark.parametrize("mode", ["median", ["mean", "median"], 3, None, [["mean"]]])
def test_an_unknown_pooling_mode_names_the_file(tiny, mode):
    write_json(tiny / "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": mode})
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json"):
        read_modules(tiny)


def test_pooling_without_the_prompt_is_read_and_a_missing_config_named(tiny):
    assert read_modules(tiny).include_prompt
    change_json(tiny / "1_Pooling/config.json", include_prompt=False)
    assert not read_modules(tiny).include_prompt
    (tiny / "1_Pooling/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json is missing"):
        read_modules(tiny)


@pytest.mark.parametrize(("schema", "dense"), [("legacy", True), ("new", False)])
def test_modules_after_pooling_are_read(tmp_path, schema, dense):
    options = {"schema": schema, "normalize": dense, "dense": dense}
    modules = read_modules(write_checkpoint(tmp_path / "c", **options))
    assert modules.normalize is dense
    assert modules.dense == (("2_Dense",) if dense else ())
    dropout = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dropout", "Dropout")
    change_modules(tmp_path / "c", *dropout)  # has no effect
    assert read_modules(tmp_path / "c").dense == ()


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        ([("2_Normalize", "Normalize"), ("1_Pooling", "Pooling")], "Pooling"),
        ([("2_Dense", "Dense"), ("1_Pooling", "Pooling")], "Pooling"),
        ([("1_Pooling", "Pooling"), ("1_Pooling", "Pooling")], "Pooling"),
        ([("2_Normalize", "Normalize"), ("3_Dense", "Dense")], "Dense"),
        ([("1_Pooling", "Pooling"), ("2", "WeightedLayerPooling")], "WeightedLayerPooling"),
        ([("1_Pooling", "my_code.Pooling")], "my_code.Pooling"),
        ([("1_Pooling", "Pooling"), ("3", "my_code.Normalize")], "my_code.Normalize"),
        ([("1_Pooling", "Pooling"), ("", "Transformer")], "Transformer"),
    ],
)
def test_a_module_that_cannot_be_exported_is_named(tiny, modules, name):
    (tiny / "2_Dense").mkdir()
    change_modules(tiny, ("", "Transformer"), *modules)
    with pytest.raises(CheckpointError, match=rf"modules.json: module .*{name}"):
        read_modules(tiny)


@pytest.mark.parametrize("text", ["", "no json", '{"a": 1}', '[{"type": "x"}]', "[1]", "null", "7"])
def test_an_unreadable_list_of_modules_is_named(tiny, text):
    (tiny / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules.json"):
        read_modules(tiny)


# Dense

SHAPES = {"linear.weight": (16, 32), "linear.bias": (16,)}


@pytest.fixture
def dense(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "dense", dense=True) / "2_Dense"


def test_dense_is_read_transposed_from_both_formats(dense):
    import torch
    from safetensors.torch import load_file

    weight, bias, activation = read_dense(dense)
    assert (weight.shape, bias.shape) == ((32, 16), (16,))
    assert activation == "torch.nn.modules.activation.Tanh"
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    pickled = read_dense(dense)
    assert np.array_equal(pickled[0], weight)
    assert np.array_equal(pickled[1], bias)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"use_residual": True}, "residual"),
        ({"module_input_name": "token_embeddings"}, "token_embeddings"),
        ({"module_output_name": "projected"}, "projected"),
        ({"bias": False}, "linear.bias"),
        ({"in_features": 33}, "33"),
        ({"out_features": 15}, "16"),
        ({"activation_function": "torch.nn.Mish"}, "torch.nn.Mish"),
    ],
)
def test_a_dense_module_that_cannot_be_exported_is_named(dense, tmp_path, changes, name):
    change_json(dense / "config.json", **changes)
    with pytest.raises(CheckpointError, match=f"2_Dense.*{name}"):
        export_model(dense.parent, tmp_path / "a", precisions=["fp32"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, "shape"])
def test_invalid_tensors_of_a_dense_module_are_named(dense, name, value):
    tensors = {key: np.ones(shape, np.float32) for key, shape in SHAPES.items()}
    if value == "shape":
        tensors[name] = np.ones(7, np.float32)
    else:
        tensors[name].flat[0] = value
    save_file(tensors, dense / "model.safetensors")
    with pytest.raises(CheckpointError, match="2_Dense") as caught:
        read_dense(dense)
    assert name in str(caught.value)


def test_a_dense_module_of_another_dim_names_both(tmp_path):
    directory = write_checkpoint(tmp_path / "c", dense=True, pooling="cls+mean")
    write_json(directory / "1_Pooling/config.json", {"pooling_mode": "cls"})
    with pytest.raises(CheckpointError, match=r"2_Dense takes 64 .* 32"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])


def test_dense_without_weights_names_what_is_missing(dense):
    save_file({"linear.bias": np.zeros(16, np.float32)}, dense / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2_Dense has no tensor linear.weight"):
        read_dense(dense)
    (dense / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2_Dense has no weights"):
        read_dense(dense)
