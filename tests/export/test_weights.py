"""Weight files: safetensors, shards and pickles, their names and dtypes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import bert_config, bert_tensors, write_checkpoint, write_json

from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.reference import load_model
from onnxsim_embed.export.weights import read_tensors

WORD = "embeddings.word_embeddings.weight"
NORM = "embeddings.LayerNorm.weight"


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return bert_tensors(bert_config(num_hidden_layers=1))


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def tensorflow_name(name: str) -> str:
    if "LayerNorm" in name:
        name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
    return f"bert.{name}"


@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "auto_model.", "0.auto_model.", None])
def test_wrapper_prefixes_and_old_names_are_removed(tmp_path, tensors, prefix):
    stored = {k if prefix is None else prefix + k: v for k, v in tensors.items()}
    if prefix is None:
        stored = {tensorflow_name(k): v for k, v in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert same(read_tensors(tmp_path), tensors)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_become_float32_in_both_formats_and_integers_are_ignored(tmp_path, tensors, dtype):
    import torch
    from safetensors.torch import save_file as save_torch

    stored = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in tensors.items()}
    expected = {k: v.float().numpy() for k, v in stored.items()}
    stored["embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(stored, tmp_path / "pytorch_model.bin")
    assert same(read_tensors(tmp_path), expected)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read beside safetensors")
    save_torch(stored, tmp_path / "model.safetensors")
    assert {v.dtype for v in read_tensors(tmp_path).values()} == {np.dtype(np.float32)}
    assert same(read_tensors(tmp_path), expected)


def test_a_damaged_pickle_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"no zip, no pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        read_tensors(tmp_path)


def test_a_pickle_without_pytorch_names_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install torch"):
        read_tensors(tmp_path)


def save_shards(directory: Path, tensors: dict[str, np.ndarray], suffix: str) -> Path:
    """Write two shards with a stem and suffix of either format; return their index."""
    import torch

    weight_map = {}
    stem = suffix.replace("bin", "pytorch_model").replace("safetensors", "model")
    for number in (0, 1):
        file = f"{stem}-0000{number + 1}-of-00002.{suffix}"
        shard = {name: tensors[name] for name in sorted(tensors)[number::2]}
        if suffix == "bin":
            torch.save({k: torch.from_numpy(v) for k, v in shard.items()}, directory / file)
        else:
            save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = directory / f"{stem}.{suffix}.index.json"
    write_json(index, {"metadata": {}, "weight_map": weight_map})
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(tmp_path, tensors, suffix):
    index = save_shards(tmp_path, tensors, suffix)
    assert same(read_tensors(tmp_path), tensors)
    next(tmp_path.glob("*-00002-of-00002.*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        read_tensors(tmp_path)
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors"):
        write_json(index, {"weight_map": {WORD: name}})
        with pytest.raises(CheckpointError, match="outside its directory"):
            read_tensors(tmp_path)
    for weight_map in ([], "x", None, 3):
        write_json(index, {"weight_map": weight_map})
        with pytest.raises(CheckpointError, match="weight_map"):
            read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float16, np.nan), (np.float32, np.inf), (np.float32, -np.inf), (np.float64, 1e300)],
)
def test_a_tensor_that_is_not_finite_in_float32_is_named(tmp_path, tensors, value, dtype):
    stored = {k: v.astype(dtype) for k, v in tensors.items()}
    stored[NORM][3] = value
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{NORM}'.* NaN or infinite"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x" * 99])
def test_a_damaged_safetensors_file_is_named(tmp_path, tensors, damage):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"no weights: .*model.safetensors"):
        read_tensors(tmp_path)
    save_file(tensors, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a readable safetensors"):
        read_tensors(tmp_path)


def test_one_tensor_under_two_names_must_be_equal(tmp_path, tensors):
    twin = {f"bert.{NORM}": tensors[NORM].copy()}
    save_file(tensors | twin, tmp_path / "model.safetensors")
    assert same(read_tensors(tmp_path), tensors)
    twin[f"bert.{NORM}"][0] += 1
    save_file(tensors | twin, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"two different tensors '{NORM}'"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "vocab.txt"]
)
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    directory = write_checkpoint(tmp_path / "c")
    if name == "vocab.txt":
        (directory / "tokenizer.json").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 133466304\n"
    (directory / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer"):
        export_model(directory, tmp_path / "a", precisions=["fp32"])


@pytest.mark.parametrize("prefix", ["model.", "0.auto_model."])
def test_prefixed_weights_export_and_the_reference_has_them(tmp_path, prefix):
    directory = write_checkpoint(tmp_path / "c")
    tensors = load_file(directory / "model.safetensors")
    save_file({prefix + k: v for k, v in tensors.items()}, directory / "model.safetensors")
    report = export_model(directory, tmp_path / "a", precisions=["fp32"]).manifest.verification
    assert (report["fp32"]["reference"], report["fp32"]["problems"]) == ("PyTorch", [])
    incomplete = {prefix + k: v for k, v in tensors.items() if k != NORM}
    save_file(incomplete, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=NORM):
        load_model(open_checkpoint(directory))
