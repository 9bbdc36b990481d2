"""Files made to do harm: nothing of theirs is run, and nothing outside their directory is read."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from scipy import sparse
from support import read_json, write_checkpoint, write_json

from onnxsim_embed import Embedder, open_graph, write_graph
from onnxsim_embed.artifact.manifest import MANIFEST
from onnxsim_embed.doctor import diagnose, repair
from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.export import export_model
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.modules import read_dense
from onnxsim_embed.export.weights import read_safetensors
from onnxsim_embed.files.provenance import sidecar
from onnxsim_embed.files.vectors import read_provenance, read_vectors

VECTORS = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)


@pytest.fixture
def mark(tmp_path):
    """A directory that is created if something hostile is run."""
    return tmp_path / "was_run"


class Bomb:
    """An object whose pickle makes a directory when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


# no pickle is ever loaded


@pytest.mark.parametrize("name", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_a_pickle_of_weights_is_not_run(tmp_path, mark, name):
    pytest.importorskip("torch")
    directory = write_checkpoint(tmp_path / "c", dense=True)
    (directory / name).with_name("model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps({"linear.weight": Bomb(mark)}))
    read = partial(read_dense, directory / "2_Dense")
    with pytest.raises(OnnxsimEmbedError, match="weights_only"):
        read() if "Dense" in name else open_checkpoint(directory).tensors()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "read"),
    [("model.safetensors", read_safetensors), ("bare.npy", read_vectors), ("objects.npy", read_vectors),
     ("shard.npz", None), ("objects.npz", None)],
)  # fmt: skip
def test_a_pickle_under_another_name_is_not_run(tmp_path, mark, name, read):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(mark)))
    if name == "objects.npy":
        np.save(path, np.array([[Bomb(mark)]], object), allow_pickle=True)
    if read is None:
        graph = write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
        shard = graph.directory / graph.parts[0].file
        if name == "objects.npz":
            np.savez(path, **dict(np.load(shard)) | {"data": np.array([Bomb(mark)], object)})
        path.rename(shard)
    with pytest.raises(OnnxsimEmbedError, match=r"not a readable|is damaged"):
        read(path) if read else open_graph(tmp_path / "graph").to_matrix()
    assert not mark.exists()


# paths cannot leave the directory


OUTSIDE = ["../outside", "/etc/passwd", "a/../../outside", "..", "..\\outside"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_manifest_names_files_of_its_directory_only(copy, path):
    manifest = read_json(copy / MANIFEST)
    fp32 = manifest["precisions"]["fp32"]
    files = manifest["files"] | {path: manifest["files"]["config.json"]}
    for changes, message in (
        ({"files": files}, "outside the art"),
        ({"precisions": {"fp32": fp32 | {"file": path}}}, "does not list"),
        ({"dense": [path]}, "does not list"),
    ):
        write_json(copy / MANIFEST, manifest | changes)
        with pytest.raises(OnnxsimEmbedError, match=message):
            Embedder(copy, precision="fp32")


@pytest.mark.parametrize("path", [p for p in OUTSIDE if "\\" not in p])
def test_modules_are_directories_of_the_checkpoint(tmp_path, path):
    directory = write_checkpoint(tmp_path / "c")
    modules = read_json(directory / "modules.json")
    modules[1]["path"] = path
    write_json(directory / "modules.json", modules)
    with pytest.raises(OnnxsimEmbedError, match="outside the checkpoint"):
        open_checkpoint(directory)
    findings = diagnose(directory)
    assert any(path in finding.file and finding.change is None for finding in findings)
    repair(directory, findings)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("path", OUTSIDE)
def test_shards_of_a_graph_are_files_of_its_directory(tmp_path, path):
    write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    index = read_json(tmp_path / "graph/index.json")
    index["parts"][0]["file"] = path
    write_json(tmp_path / "graph/index.json", index)
    with pytest.raises(OnnxsimEmbedError, match="shard 0"):
        open_graph(tmp_path / "graph")


# links out of the directory are rejected


def link(path, target):
    """Move a file, and link to it from where it was."""
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/model.onnx"])
def test_a_link_out_of_an_artifact_is_rejected(copy, tmp_path, name):
    link(copy / name, tmp_path / "outside")
    with pytest.raises(OnnxsimEmbedError, match="outside"):
        Embedder(copy, precision="fp32")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"]
)
def test_a_link_out_of_a_checkpoint_is_rejected(tmp_path, name):
    directory = write_checkpoint(tmp_path / "c")
    link(directory / name, tmp_path / "outside")
    with pytest.raises(OnnxsimEmbedError, match="outside"):
        export_model(directory, tmp_path / "artifact", precisions=["fp32"])
    assert not (tmp_path / "artifact").exists()


def test_the_hub_s_cache_which_is_made_of_links_is_read(tmp_path):
    snapshot = write_checkpoint(tmp_path / "models--x/snapshots/1")
    link(snapshot / "model.safetensors", tmp_path / "models--x/blobs/b")
    assert open_checkpoint(snapshot).tensors()


# sizes and shapes are checked before memory is taken


@pytest.fixture
def taken():
    """Return the most bytes that Python and numpy have taken since the start of the test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


HUGE = 1 << 40


def test_a_tensor_larger_than_its_file_takes_no_memory(tmp_path, taken):
    for shape, end in [([HUGE], 4 * HUGE), ([HUGE], 16), ([1 << 62, 1 << 62], 16), ([4], 4 * HUGE)]:
        header = {"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        with pytest.raises(OnnxsimEmbedError, match="not a readable safetensors"):
            read_safetensors(path)
    path.write_bytes(struct.pack("<Q", HUGE) + b"{}")
    with pytest.raises(OnnxsimEmbedError, match="not a readable safetensors"):
        read_safetensors(path)
    assert taken() < 1 << 22


def write_header(path, shape):
    with path.open("wb") as stream:
        head = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, head)
        stream.write(bytes(64))


@pytest.mark.parametrize("shape", [(HUGE, 4), (1 << 62, 1 << 62), (3, HUGE), (HUGE,)])
def test_arrays_larger_than_their_file_take_no_memory(tmp_path, taken, shape):
    write_header(tmp_path / "v.npy", shape)
    with pytest.raises(OnnxsimEmbedError, match="not a readable"):
        read_vectors(tmp_path / "v.npy")
    assert taken() < 1 << 22
    write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    write_header(tmp_path / "graph/diagonal.npy", shape)
    with pytest.raises(OnnxsimEmbedError, match="is damaged"):
        open_graph(tmp_path / "graph").to_matrix()


def test_a_shard_larger_than_its_file_is_rejected(tmp_path):
    graph = write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    shard = graph.directory / graph.parts[0].file
    matrix = sparse.load_npz(shard)
    wide = sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), (9, HUGE))
    sparse.save_npz(shard, wide)
    with pytest.raises(OnnxsimEmbedError, match="is damaged"):
        open_graph(graph.directory).to_matrix()


def test_a_file_of_another_size_than_the_manifest_says_is_not_read(copy):
    with (copy / "onnx/model.onnx").open("r+b") as stream:
        stream.truncate(HUGE)  # a hole: takes no space on the disk
    with pytest.raises(OnnxsimEmbedError, match="is damaged: 1,099,511,627,776 bytes"):
        Embedder(copy, precision="fp32")


def test_a_description_without_end_is_not_read(tmp_path, taken):
    np.save(tmp_path / "v.npy", VECTORS)
    with sidecar(tmp_path / "v.npy").open("wb") as stream:
        stream.truncate(HUGE)
    assert read_provenance(tmp_path / "v.npy") is None
    assert taken() < 1 << 23


# text is never run


def test_code_that_a_checkpoint_brings_is_not_imported(tmp_path, mark):
    directory = write_checkpoint(tmp_path / "c")
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Transformer: ...\nclass BertModel: ...\n"
    for name in ("modeling_evil.py", "evil.py", "sitecustomize.py"):
        (directory / name).write_text(code)
    config = read_json(directory / "config.json")
    maps = {"AutoModel": "modeling_evil.BertModel", "AutoConfig": "modeling_evil.BertModel"}
    write_json(directory / "config.json", config | {"auto_map": maps, "trust_remote_code": True})
    tokenizer = read_json(directory / "tokenizer_config.json")
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write_json(directory / "tokenizer_config.json", tokenizer | {"chat_template": template,
               "auto_map": {"AutoTokenizer": ["evil.BertModel", None]}})  # fmt: skip
    (directory / "README.md").write_text(f"---\n!!python/object/apply:os.mkdir [{mark}]\n---\n")
    before = set(sys.modules)
    made = export_model(directory, tmp_path / "artifact", precisions=["fp32"])
    assert Embedder(made, precision="fp32").encode("a road").shape == (32,)
    modules = read_json(directory / "modules.json")
    modules[0]["type"] = "evil.Transformer"
    write_json(directory / "modules.json", modules)
    with pytest.raises(OnnxsimEmbedError, match=r"evil\.Transformer"):
        export_model(directory, tmp_path / "rejected", precisions=["fp32"])
    diagnose(directory)
    assert not mark.exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name}
    assert not list((tmp_path / "artifact").rglob("*.py"))
