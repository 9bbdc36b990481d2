"""More than ten thousand damaged files: each is read, or refused with an error that says so.

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
from support import bert_config, tokenizer_json, write_checkpoint, write_json

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


class Damage:
    """Seeded damage to bytes and to JSON values."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def to_bytes(self, data):
        data = bytearray(data)
        for _ in range(self.random.choice([1, 1, 2, 8])):
            at = self.random.randrange(len(data) + 1)
            kind = self.random.randrange(5)
            if kind == 0 and data:
                data[at - 1] = self.random.randrange(256)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                del data[at : at + self.random.randrange(1, 40)]
            elif kind == 3:
                data[at:at] = self.random.randbytes(self.random.randrange(1, 20))
            else:
                other = self.random.randrange(len(data) + 1)
                data[at:at] = data[other : other + 64]
        return bytes(data)

    def to_value(self, value):
        """Return a copy in which one to three values, keys or entries are others."""
        value = copy.deepcopy(value)
        for _ in range(self.random.choice([1, 1, 2, 3])):
            places = list(_places(value))
            if not places:
                return copy.deepcopy(self.random.choice(NASTY))
            holder, key = self.random.choice(places)
            kind = self.random.randrange(8)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[self.random.choice(["", "x", "..", "__class__", "self"])] = holder[key]
            elif kind == 2:
                other, there = self.random.choice(places)
                holder[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else other)
            else:
                holder[key] = copy.deepcopy(self.random.choice(NASTY))
        return value

    def to_json(self, value):
        """Return damaged JSON text, as bytes."""
        if self.random.random() < 0.3:
            return self.to_bytes(json.dumps(value).encode())
        return json.dumps(self.to_value(value)).encode()


def _places(value):
    """Yield every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


def survive(read, damaged, number):
    """Call `read` with so many damaged things; return how many were refused."""
    refused = 0
    for turn in range(number):
        thing = damaged(turn)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # numpy: a header as of Python 2
                read(thing)
        except CLEAN as error:
            refused += bool(str(error))  # one without a message is not counted
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            raise AssertionError(f"turn {turn}: {type(error).__name__}: {error}") from error
    return refused


COUNTS = {
    "manifests": 2500, "checkpoints": 2500, "tensors": 1500, "tokenizers": 500, "graphs": 1000,
    "journals": 1000, "sidecars": 700, "vectors": 700, "doctored": 300, "recipes": 200, "dense": 300,
}  # fmt: skip


def test_the_mutations_are_more_than_ten_thousand():
    assert sum(COUNTS.values()) >= 10_000


def test_manifests(artifact, tmp_path):
    value = json.loads((artifact / "onnxsim_embed.json").read_text())
    value["verification"] = {}  # free, and nine tenths of the text
    for entry in value["precisions"].values():
        entry["layers"] = []
    damage = Damage(1)

    def read(text):
        manifest = Manifest.from_json(text, "manifest")
        opened = Artifact(tmp_path, manifest)
        choose_precision(opened, "auto")
        for name in manifest.files:
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())

    def damaged(_):
        return damage.to_json(value).decode("utf-8", "replace")

    assert survive(read, damaged, COUNTS["manifests"]) > COUNTS["manifests"] / 4


def test_checkpoints(tmp_path):
    names = ["config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
             "config_sentence_transformers.json", "tokenizer_config.json"]  # fmt: skip
    damage = Damage(2)
    places = [
        write_checkpoint(tmp_path / s, schema=s, prompts={"q": "x"}) for s in ("legacy", "new")
    ]
    right = {(p, n): json.loads((p / n).read_text()) for p in places for n in names}

    def damaged(turn):
        place, name = places[turn % 2], names[turn // 2 % len(names)]
        (place / name).write_bytes(damage.to_json(right[place, name]))
        return place, name

    def read(thing):
        place, name = thing
        try:
            opened = open_checkpoint(place)
            assert opened.transformer.resolve().is_relative_to(place.resolve())
        finally:
            write_json(place / name, right[place, name])

    assert survive(read, damaged, COUNTS["checkpoints"]) > COUNTS["checkpoints"] / 4


def small_tensors():
    """A safetensors file's header and numbers."""
    header, numbers = {}, b""
    for name, kind, shape, size in [("a.weight", "F32", [3, 2], 24), ("b.bias", "BF16", [4], 8),
                                    ("c.gamma", "F16", [2, 2], 8), ("d.ids", "I64", [1, 2], 16)]:  # fmt: skip
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(numbers), len(numbers) + size]}  # fmt: skip
        numbers += bytes(range(size))
    return header, numbers


def test_safetensors(tmp_path):
    header, numbers = small_tensors()
    damage = Damage(3)
    path = tmp_path / "model.safetensors"

    def damaged(turn):
        text = damage.to_json(header)
        whole = struct.pack("<Q", len(text)) + text + numbers
        path.write_bytes(damage.to_bytes(whole) if turn % 3 == 0 else whole)

    def read(_):
        for tensor in read_safetensors(path).values():
            assert tensor.nbytes <= 2 * len(numbers) + 100
        read_tensors(tmp_path)

    assert survive(read, damaged, COUNTS["tensors"]) > COUNTS["tensors"] / 2


def test_dense_modules(tmp_path):
    place = write_checkpoint(tmp_path / "c", dense=True)
    config = json.loads((place / "2_Dense/config.json").read_text())
    damage = Damage(4)

    def damaged(_):
        (place / "2_Dense/config.json").write_bytes(damage.to_json(config))

    survive(lambda _: read_dense(place / "2_Dense"), damaged, COUNTS["dense"])


def test_tokenizers(tmp_path):
    value = tokenizer_json()
    value["model"]["vocab"] = dict(list(value["model"]["vocab"].items())[:30])
    path = tmp_path / "tokenizer.json"
    damage = Damage(5)

    def damaged(_):
        path.write_bytes(damage.to_json(value))

    def read(_):
        Tokenizer(path, 16)(["a road", ""])

    assert survive(read, damaged, COUNTS["tokenizers"]) > COUNTS["tokenizers"] / 4


def test_similarity_graphs(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    place = tmp_path / "graph"
    write_graph(vectors, place, threshold=0.2)
    value = json.loads((place / INDEX).read_text())
    damage = Damage(6)

    def damaged(_):
        (place / INDEX).write_bytes(damage.to_json(value))

    def read(_):
        for _, block in open_graph(place).blocks():
            assert block.shape[1] == len(vectors)

    assert survive(read, damaged, COUNTS["graphs"]) > COUNTS["graphs"] / 2


def test_journals(tmp_path):
    checkpoint = EmbeddingCheckpoint(tmp_path / "v.npy")
    with checkpoint:
        checkpoint.open({"model": "m", "dim": 4}, np.zeros((0, 4), np.float32), force=False)
        checkpoint.append(np.ones((7, 4), np.float32), "digest")
    journal = checkpoint.directory / JOURNAL
    value = json.loads(journal.read_text())
    damage = Damage(7)

    def damaged(_):
        journal.write_bytes(damage.to_json(value))

    def read(_):
        found = checkpoint.read()
        assert type(found["rows"]) is int
        assert isinstance(found["texts"], str)

    assert survive(read, damaged, COUNTS["journals"]) > COUNTS["journals"] / 3


def test_descriptions_of_vectors(artifact, tmp_path):
    from onnxsim_embed import Embedder

    path = tmp_path / "v.npy"
    origin = provenance_of(Embedder(artifact, precision="fp32"))
    write_vectors(np.ones((3, 32), np.float32), path, origin)
    value = json.loads(sidecar(path).read_text())
    damage, left_aside = Damage(8), []

    def damaged(_):
        sidecar(path).write_bytes(damage.to_json(value))

    def read(_):
        left_aside.append(read_provenance(path) is None)

    assert survive(read, damaged, COUNTS["sidecars"]) == 0
    assert sum(left_aside) > COUNTS["sidecars"] / 2


def test_files_of_vectors(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((3, 4), np.float32))
    right = (tmp_path / "v.npy").read_bytes()
    damage = Damage(9)

    def damaged(turn):
        # Damage to the header above all: to the shape, the number format and the length.
        cut = 128 if turn % 2 else len(right)
        (tmp_path / "v.npy").write_bytes(damage.to_bytes(right[:cut]) + right[cut:])

    def read(_):
        found = read_vectors(tmp_path / "v.npy")
        assert found.ndim == 2
        assert found.nbytes < 2 * len(right)

    assert survive(read, damaged, COUNTS["vectors"]) > COUNTS["vectors"] / 3


def test_directories_to_be_examined(tmp_path):
    place = write_checkpoint(tmp_path / "c", schema="new")
    names = [str(path.relative_to(place)) for path in sorted(place.rglob("*.json"))]
    right = {name: (place / name).read_bytes() for name in names}
    damage = Damage(10)

    def damaged(turn):
        name = names[turn % len(names)]
        (place / name).write_bytes(damage.to_json(json.loads(right[name])))
        return name

    def read(name):
        try:
            for finding in diagnose(place):
                if finding.change is not None and finding.file != name:
                    finding.change(json.loads(right.get(finding.file, b"null")))
        finally:
            (place / name).write_bytes(right[name])

    assert survive(read, damaged, COUNTS["doctored"]) == 0


def test_recipes(tmp_path):
    right = (recipes_directory() / "all-MiniLM-L6-v2.toml").read_bytes()
    damage = Damage(11)

    def damaged(_):
        (tmp_path / "r.toml").write_bytes(damage.to_bytes(right))

    assert survive(lambda _: read_recipe(tmp_path / "r.toml"), damaged, COUNTS["recipes"]) > 20


def test_the_config_that_damage_is_done_to_is_a_right_one(tmp_path):
    place = write_checkpoint(tmp_path / "c", config=bert_config())
    assert open_checkpoint(place).max_seq_length == 48
