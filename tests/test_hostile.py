"""Files made to do harm: nothing of theirs is run, and nothing outside their directory is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from support import write_checkpoint, write_json

from onnxsim_embed import Embedder, open_graph, write_graph
from onnxsim_embed.artifact.manifest import Artifact
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
    """A directory that comes into being if something hostile is run."""
    return tmp_path / "was_run"


class Bomb:
    """An object whose pickle makes a directory when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def copy(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


# no pickle is ever loaded


def test_the_bomb_of_these_tests_works(mark):
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_a_pickle_of_weights_is_not_run(tmp_path, mark, name):
    pytest.importorskip("torch")
    place = write_checkpoint(tmp_path / "c", dense=True)
    (place / name).with_name("model.safetensors").unlink()
    (place / name).write_bytes(pickle.dumps({"linear.weight": Bomb(mark)}))
    with pytest.raises(OnnxsimEmbedError, match="weights_only"):
        read_dense(place / "2_Dense") if "Dense" in name else open_checkpoint(place).tensors()
    assert not mark.exists()


def test_a_pickle_under_a_safe_name_is_not_run(tmp_path, mark):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OnnxsimEmbedError, match="not a readable safetensors"):
        read_safetensors(path)
    assert not mark.exists()


def test_vectors_that_are_pickles_are_not_run(tmp_path, mark):
    np.save(tmp_path / "objects.npy", np.array([[Bomb(mark)]], object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("objects.npy", "bare.npy"):
        with pytest.raises(OnnxsimEmbedError, match="not a readable"):
            read_vectors(tmp_path / name)
    assert not mark.exists()


def test_parts_of_a_graph_that_are_pickles_are_not_run(tmp_path, mark):
    graph = write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    part = graph.directory / graph.parts[0].file
    whole = dict(np.load(part))
    np.savez(part, **whole | {"data": np.array([Bomb(mark)], object)})
    with pytest.raises(OnnxsimEmbedError, match="is damaged"):
        open_graph(tmp_path / "graph").to_matrix()
    part.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(OnnxsimEmbedError, match="is damaged"):
        open_graph(tmp_path / "graph").to_matrix()
    assert not mark.exists()


# paths cannot leave the directory


OUTSIDE = ["../outside", "/etc/passwd", "a/../../outside", "..", "..\\outside"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_manifest_names_files_of_its_directory_only(copy, path):
    manifest = json.loads((copy / "onnxsim_embed.json").read_text())
    manifest["files"][path] = manifest["files"]["config.json"]
    write_json(copy / "onnxsim_embed.json", manifest)
    with pytest.raises(OnnxsimEmbedError, match="outside the artifact"):
        Artifact.open(copy)


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_precision_and_a_dense_module_are_files_of_the_manifest(copy, path):
    manifest = json.loads((copy / "onnxsim_embed.json").read_text())
    manifest["precisions"]["fp32"]["file"] = path
    write_json(copy / "onnxsim_embed.json", manifest)
    with pytest.raises(OnnxsimEmbedError, match="does not list"):
        Embedder(copy, precision="fp32")
    manifest["precisions"]["fp32"]["file"] = "onnx/model.onnx"
    write_json(copy / "onnxsim_embed.json", manifest | {"dense": [path]})
    with pytest.raises(OnnxsimEmbedError, match="does not list"):
        Embedder(copy, precision="fp32")


@pytest.mark.parametrize("path", [p for p in OUTSIDE if "\\" not in p])
def test_modules_are_directories_of_the_checkpoint(tmp_path, path):
    place = write_checkpoint(tmp_path / "c")
    modules = json.loads((place / "modules.json").read_text())
    modules[1]["path"] = path
    write_json(place / "modules.json", modules)
    with pytest.raises(OnnxsimEmbedError, match="outside the checkpoint"):
        open_checkpoint(place)
    findings = diagnose(place)
    assert any(path in finding.file and finding.change is None for finding in findings)
    repair(place, findings)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("path", OUTSIDE)
def test_parts_of_a_graph_are_files_of_its_directory(tmp_path, path):
    write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    index = json.loads((tmp_path / "graph/index.json").read_text())
    index["parts"][0]["file"] = path
    write_json(tmp_path / "graph/index.json", index)
    with pytest.raises(OnnxsimEmbedError, match="shard 0"):
        open_graph(tmp_path / "graph")


# links out of the directory are refused


LINKED = ["tokenizer.json", "onnx/model.onnx"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_an_artifact_is_refused(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(OnnxsimEmbedError, match="outside"):
        Embedder(copy, precision="fp32")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"]
)
def test_a_link_out_of_a_checkpoint_is_refused(tmp_path, name):
    place = write_checkpoint(tmp_path / "c")
    (place / name).rename(tmp_path / "outside")
    (place / name).symlink_to(tmp_path / "outside")
    with pytest.raises(OnnxsimEmbedError, match="outside"):
        export_model(place, tmp_path / "artifact", precisions=["fp32"])
    assert not (tmp_path / "artifact").exists()


def test_the_hub_s_cache_which_is_made_of_links_is_read(tmp_path):
    snapshot = write_checkpoint(tmp_path / "models--x/snapshots/1")
    blob = tmp_path / "models--x/blobs/b"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
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


@pytest.mark.parametrize("shape", [(HUGE, 4), (1 << 62, 1 << 62), (3, HUGE)])
def test_vectors_larger_than_their_file_take_no_memory(tmp_path, taken, shape):
    with (tmp_path / "v.npy").open("wb") as stream:
        head = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, head)
        stream.write(bytes(64))
    with pytest.raises(OnnxsimEmbedError, match="not a readable"):
        read_vectors(tmp_path / "v.npy")
    assert taken() < 1 << 22


@pytest.mark.parametrize("shape", [(HUGE,), (1 << 62, 1 << 62)])
def test_a_diagonal_larger_than_its_file_is_refused(tmp_path, shape):
    write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    with (tmp_path / "graph/diagonal.npy").open("wb") as stream:
        head = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, head)
    with pytest.raises(OnnxsimEmbedError, match="is damaged"):
        open_graph(tmp_path / "graph").to_matrix()


def test_a_part_larger_than_its_file_is_refused(tmp_path):
    graph = write_graph(VECTORS, tmp_path / "graph", threshold=0.2)
    part = graph.directory / graph.parts[0].file
    matrix = sparse.load_npz(part)
    sparse.save_npz(part, sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), (9, HUGE)))
    with pytest.raises(OnnxsimEmbedError, match="is damaged"):
        open_graph(graph.directory).to_matrix()


def test_a_file_of_another_size_than_the_manifest_says_is_not_read(copy):
    with (copy / "onnx/model.onnx").open("r+b") as stream:
        stream.truncate(HUGE)  # a hole: takes no place on the disk
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
    place = write_checkpoint(tmp_path / "c")
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Transformer: ...\nclass BertModel: ...\n"
    for name in ("modeling_evil.py", "evil.py", "sitecustomize.py"):
        (place / name).write_text(code)
    config = json.loads((place / "config.json").read_text())
    maps = {"AutoModel": "modeling_evil.BertModel", "AutoConfig": "modeling_evil.BertModel"}
    write_json(place / "config.json", config | {"auto_map": maps, "trust_remote_code": True})
    tokenizer = json.loads((place / "tokenizer_config.json").read_text())
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write_json(place / "tokenizer_config.json", tokenizer | {"chat_template": template,
               "auto_map": {"AutoTokenizer": ["evil.BertModel", None]}})  # fmt: skip
    (place / "README.md").write_text(f"---\n!!python/object/apply:os.mkdir [{mark}]\n---\n")
    before = set(sys.modules)
    made = export_model(place, tmp_path / "artifact", precisions=["fp32"])
    assert Embedder(made, precision="fp32").encode("a road").shape == (32,)
    modules = json.loads((place / "modules.json").read_text())
    modules[0]["type"] = "evil.Transformer"
    write_json(place / "modules.json", modules)
    with pytest.raises(OnnxsimEmbedError, match=r"evil\.Transformer"):
        export_model(place, tmp_path / "refused", precisions=["fp32"])
    diagnose(place)
    assert not mark.exists()
    assert not {name for name in set(sys.modules) - before if "evil" in name}
    assert not list((tmp_path / "artifact").rglob("*.py"))


@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "evil.Evil", "__main__"])
def test_a_module_is_a_name_and_not_an_import(tmp_path, kind):
    place = write_checkpoint(tmp_path / "c")
    modules = json.loads((place / "modules.json").read_text())
    write_json(place / "modules.json", [*modules, {"idx": 3, "name": "3", "path": "3", "type": kind}])  # fmt: skip
    with pytest.raises(OnnxsimEmbedError, match="cannot be exported"):
        open_checkpoint(place)
