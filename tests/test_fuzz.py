"""More than ten thousand damaged files: each is read, or rejected with an error that says so.

Damage is of two kinds: to the bytes, and to the values of well-formed JSON. Seeds are fixed.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import struct
import warnings

import numpy as np
import pytest
from support import read_json, tokenizer_json, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact, Manifest
from onnxsim_embed.artifact.precision import choose_precision
from onnxsim_embed.artifact.recipes import read_recipe, recipes_directory
from onnxsim_embed.doctor import diagnose
from onnxsim_embed.errors import OnnxsimEmbedError
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.modules import read_dense
from onnxsim_embed.export.weights import read_safetensors, read_tensors
from onnxsim_embed.files.checkpoint import JOURNAL, EmbeddingCheckpoint
from onnxsim_embed.files.provenance import sidecar
from onnxsim_embed.files.vectors import read_provenance, read_vectors, write_vectors
from onnxsim_embed.runtime.provenance import provenance_of
from onnxsim_embed.runtime.tokenization import Tokenizer
from onnxsim_embed.similarity.graph import INDEX, open_graph
from onnxsim_embed.similarity.graph_writer import write_graph

CLEAN = (OnnxsimEmbedError, ValueError, TypeError, FileNotFoundError)

NASTY = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, float("nan"),
    float("inf"), "", "..", "../../etc/passwd", "/etc/passwd", "\\\\host\\x", "C:\\x", "a\x00b",
    "\ud800", "\x1b[2J", "x" * 5000, "mean", "__import__('os').system('x')", [], [[]], [None], {},
    {"": {}}, {"a": [1, {"b": None}]}, [0] * 50, -0.0, "0", "null", "os.system",
]  # fmt: skip


class Damage(random.Random):
    """Seeded damage to bytes and to JSON values."""

    def to_bytes(self, data):
        data = bytearray(data)
        for _ in range(self.choice([1, 1, 2, 8])):
            at = self.randrange(len(data) + 1)
            kind = self.randrange(5)
            if kind == 0 and data:
                data[at - 1] = self.randrange(256)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                del data[at : at + self.randrange(1, 40)]
            elif kind == 3:
                data[at:at] = self.randbytes(self.randrange(1, 20))
            else:
                other = self.randrange(len(data) + 1)
                data[at:at] = data[other : other + 64]
        return bytes(data)

    def to_value(self, value):
        """Return a copy in which one to three values, keys or entries are others."""
        value = copy.deepcopy(value)
        for _ in range(self.choice([1, 1, 2, 3])):
            keys = list(all_keys(value))
            if not keys:
                return copy.deepcopy(self.choice(NASTY))
            holder, key = self.choice(keys)
            kind = self.randrange(8)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[self.choice(["", "x", "..", "__class__", "self"])] = holder[key]
            elif kind == 2:
                other, there = self.choice(keys)
                holder[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else other)
            else:
                holder[key] = copy.deepcopy(self.choice(NASTY))
        return value

    def to_json(self, value):
        """Return damaged JSON text, as bytes."""
        if self.random() < 0.3:
            return self.to_bytes(json.dumps(value).encode())
        return json.dumps(self.to_value(value)).encode()


def all_keys(value):
    """Yield every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from all_keys(inner)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


def survive(count, write, read):
    """Write and read `count` damaged files; return the fraction that was rejected with a message."""
    rejected, damage = 0, Damage(count)
    for turn in range(count):
        written = write(damage, turn)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # numpy: a header as of Python 2
                read(written)
        except CLEAN as error:
            rejected += bool(str(error))
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            raise AssertionError(f"turn {turn}: {type(error).__name__}: {error}") from error
    return rejected / count


def survive_json(count, path, read, value=None):
    """Damage a JSON file."""
    value = read_json(path) if value is None else value
    return survive(count, lambda damage, _: path.write_bytes(damage.to_json(value)), read)


def test_manifests(artifact, tmp_path):
    value = read_json(artifact / "onnxsim_embed.json")
    value["verification"] = {}  # free, and nine tenths of the text
    for entry in value["precisions"].values():
        entry["layers"] = []

    def read(_):
        manifest = Manifest.from_json((tmp_path / "m").read_text("utf-8", "replace"), "manifest")
        choose_precision(Artifact(tmp_path, manifest), "auto")
        for name in manifest.files:
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())

    assert survive_json(2500, tmp_path / "m", read, value) > 1 / 4


@pytest.mark.parametrize(("use", "count", "least"), [("open", 2500, 1 / 4), ("diagnose", 300, 0)])
def test_checkpoints(tmp_path, use, count, least):
    files = []
    for schema in ("legacy", "new"):
        directory = write_checkpoint(tmp_path / schema, schema=schema, prompts={"q": "x"})
        paths = [*directory.glob("*.json"), directory / "1_Pooling/config.json"]
        files += [(path, path.read_bytes()) for path in sorted(paths)]
    if use == "open":
        files = [(path, right) for path, right in files if path.name != "tokenizer.json"]

    def write(damage, turn):
        path, right = files[turn % len(files)]
        path.write_bytes(damage.to_json(json.loads(right)))
        return path, right

    def read(written):
        path, right = written
        directory = next(parent for parent in path.parents if parent.parent == tmp_path)
        try:
            if use == "open":
                opened = open_checkpoint(directory)
                assert opened.transformer.resolve().is_relative_to(directory.resolve())
                return
            for finding in diagnose(directory):
                if finding.change is not None and directory / finding.file != path:
                    file = directory / finding.file
                    finding.change(read_json(file) if file.is_file() else None)
        finally:
            path.write_bytes(right)

    rejected = survive(count, write, read)
    assert rejected > least if use == "open" else rejected == 0


def test_safetensors(tmp_path):
    header, numbers = {}, b""
    for name, kind, shape, size in [("a.weight", "F32", [3, 2], 24), ("b.bias", "BF16", [4], 8),
                                    ("c.gamma", "F16", [2, 2], 8), ("d.ids", "I64", [1, 2], 16)]:  # fmt: skip
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(numbers), len(numbers) + size]}  # fmt: skip
        numbers += bytes(range(size))
    path = tmp_path / "model.safetensors"

    def write(damage, turn):
        text = damage.to_json(header)
        content = struct.pack("<Q", len(text)) + text + numbers
        path.write_bytes(damage.to_bytes(content) if turn % 3 == 0 else content)

    def read(_):
        for tensor in read_safetensors(path).values():
            assert tensor.nbytes <= 2 * len(numbers) + 100
        read_tensors(tmp_path)

    assert survive(1500, write, read) > 1 / 2


def test_dense_modules(tmp_path):
    directory = write_checkpoint(tmp_path / "c", dense=True) / "2_Dense"
    assert survive_json(300, directory / "config.json", lambda _: read_dense(directory)) > 0


def test_tokenizers(tmp_path):
    value = tokenizer_json()
    value["model"]["vocab"] = dict(list(value["model"]["vocab"].items())[:30])
    path = tmp_path / "tokenizer.json"
    assert survive_json(500, path, lambda _: Tokenizer(path, 16)(["a road", ""]), value) > 1 / 4


def test_similarity_graphs(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    write_graph(vectors, tmp_path / "graph", threshold=0.2)

    def read(_):
        for _, block in open_graph(tmp_path / "graph").blocks():
            assert block.shape[1] == len(vectors)

    assert survive_json(1000, tmp_path / "graph" / INDEX, read) > 1 / 2


def test_journals(tmp_path):
    checkpoint = EmbeddingCheckpoint(tmp_path / "v.npy")
    with checkpoint:
        checkpoint.open({"model": "m", "dim": 4}, np.zeros((0, 4), np.float32), force=False)
        checkpoint.append(np.ones((7, 4), np.float32), "digest")

    def read(_):
        journal = checkpoint.read()
        assert type(journal["rows"]) is int
        assert isinstance(journal["texts"], str)

    assert survive_json(1000, checkpoint.directory / JOURNAL, read) > 1 / 3


def test_provenance_of_vectors(artifact, tmp_path):
    path, ignored = tmp_path / "v.npy", []
    provenance = provenance_of(Embedder(artifact, precision="fp32"))
    write_vectors(np.ones((3, 32), np.float32), path, provenance)
    read = lambda _: ignored.append(read_provenance(path) is None)  # noqa: E731
    assert survive_json(700, sidecar(path), read) == 0
    assert sum(ignored) > 350


def test_files_of_vectors(tmp_path):
    path = tmp_path / "v.npy"
    np.save(path, np.ones((3, 4), np.float32))
    right = path.read_bytes()

    def write(damage, turn):
        # Damage to the header above all: to the shape, the number format and the length.
        cut = 128 if turn % 2 else len(right)
        path.write_bytes(damage.to_bytes(right[:cut]) + right[cut:])

    def read(_):
        vectors = read_vectors(path)
        assert vectors.ndim == 2
        assert vectors.nbytes < 2 * len(right)

    assert survive(700, write, read) > 1 / 3


def test_recipes(tmp_path):
    right, path = (recipes_directory() / "all-MiniLM-L6-v2.toml").read_bytes(), tmp_path / "r.toml"
    write = lambda damage, _: path.write_bytes(damage.to_bytes(right))  # noqa: E731
    assert survive(200, write, lambda _: read_recipe(path)) > 1 / 10
