"""doctor: each rule has a finding (file, key, readers), and a fix where a JSON file can be changed."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import change_json, read_json, write_checkpoint, write_json

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact, sha256
from onnxsim_embed.doctor import READERS, diagnose, repair
from onnxsim_embed.doctor.directory import FASTEMBED, JS, OURS, ST, TEI, TOKENIZERS, Directory
from onnxsim_embed.errors import ArtifactError
from onnxsim_embed.system import hardware


@pytest.fixture
def model(copy):
    """A directory without findings and without a manifest: any file of it may be changed."""
    (copy / "onnxsim_embed.json").unlink()
    return copy


def findings(directory, **options):
    """Return (file, key, reader) of each finding."""
    return {(f.file, f.key, name) for f in diagnose(directory, **options) for name in f.readers}


def each(file, key, *readers):
    return {(file, key, reader) for reader in readers}


def test_an_artifact_has_no_findings(artifact, model):
    assert diagnose(artifact) == diagnose(model) == []


# tokenizer files

BAKED = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_token": "[PAD]"}
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("file", "key", "value", "readers"),
    [
        ("tokenizer.json", "padding", BAKED, (FASTEMBED, TOKENIZERS)),
        ("tokenizer.json", "truncation", CUT, (TOKENIZERS,)),
        ("tokenizer_config.json", "model_max_length", 512, (FASTEMBED, JS)),
        ("tokenizer_config.json", "model_max_length", 1e30, (FASTEMBED, JS)),
        ("tokenizer_config.json", "max_length", 8, (FASTEMBED,)),
    ],
)
def test_stale_keys(model, file, key, value, readers):
    right = read_json(model / file)
    write_json(model / file, right | {key: value})
    assert findings(model) == each(file, key, *readers)
    assert repair(model, diagnose(model)) == [file]
    assert diagnose(model) == []
    assert read_json(model / file) == right


@pytest.mark.parametrize(("stated", "readers"), [(4096, (TEI, ST)), (None, (TEI,)), ("", (TEI,))])
def test_max_seq_length(model, stated, readers):
    name = "sentence_bert_config.json"
    change_json(model / "tokenizer_config.json", model_max_length=40 if stated != 4096 else 64)
    if stated == "":
        (model / name).unlink()
    else:
        change_json(model / name, max_seq_length=stated)
    assert findings(model) == each(name, "max_seq_length", *readers)
    repair(model, diagnose(model))
    assert diagnose(model) == []
    length = 64 if stated == 4096 else 40  # 64 are the position embeddings
    assert read_json(model / name) == {"max_seq_length": length, "do_lower_case": False}


@pytest.mark.parametrize("named", [True, False])
def test_a_padding_token_is_found_by_its_id(model, named):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change_json(model / name, pad_token=None)
    if not named:
        change_json(model / "tokenizer.json", added_tokens=None)
    assert findings(model) == each("tokenizer_config.json", "pad_token", FASTEMBED)
    repair(model, diagnose(model))
    written = read_json(model / "tokenizer_config.json").get("pad_token")
    assert written == ("[PAD]" if named else None)


@pytest.mark.parametrize(
    ("name", "readers", "written"),
    [
        ("special_tokens_map.json", (FASTEMBED,), True),
        ("modules.json", (ST,), True),
        ("config.json", (ST, FASTEMBED, TEI, JS), False),
        ("tokenizer.json", (FASTEMBED, TEI, JS), False),
        ("tokenizer_config.json", (FASTEMBED, JS), False),
    ],
)
def test_a_missing_file_is_written_or_exported_again(model, name, readers, written):
    right = read_json(model / name)
    (model / name).unlink()
    assert findings(model) == each(name, None, *readers)
    (finding,) = diagnose(model)
    assert (f"onnxsim-embed export {model} -o" in finding.fix) is not written
    assert repair(model, [finding]) == ([name] if written else [])
    assert not written or read_json(model / name) == right


def test_config_json_in_the_directory_of_the_transformer_module(model):
    modules = read_json(model / "modules.json")
    write_json(model / "modules.json", [modules[0] | {"path": "0_Transformer"}, *modules[1:]])
    (model / "0_Transformer").mkdir()
    (model / "config.json").rename(model / "0_Transformer/config.json")
    assert findings(model) == each("config.json", None, FASTEMBED, TEI, JS)


# modules


def test_missing_modules_and_pooling_are_not_guessed(model, tmp_path):
    (model / "modules.json").unlink()
    (model / "2_Normalize").rmdir()  # lost in a copy, or never there
    (finding,) = diagnose(model)
    assert (finding.file, finding.change) == ("modules.json", None)
    assert "--pooling" in finding.fix
    plain = write_checkpoint(tmp_path / "c", pooling=None)
    assert each("1_Pooling/config.json", None, TEI) <= findings(plain)
    assert not [f for f in diagnose(plain, [ST]) if f.change]


def test_new_schema_files_become_those_of_both_schemas(tmp_path):
    model = write_checkpoint(tmp_path / "c", schema="new", pooling="lasttoken")
    assert findings(model) >= {
        *each("1_Pooling/config.json", "pooling_mode_cls_token", ST, TEI),
        ("modules.json", "type", ST),
        ("sentence_bert_config.json", "max_seq_length", TEI),
    }
    repair(model, diagnose(model))
    remaining = {(file, key) for file, key, _ in findings(model, readers=[ST, TEI])}
    assert remaining == {("onnx/model.onnx", None)}
    table = read_json(model / "1_Pooling/config.json")
    chosen = [key for key, value in table.items() if value is True and key != "include_prompt"]
    assert chosen == ["pooling_mode_lasttoken"]
    assert (table["pooling_mode"], table["word_embedding_dimension"]) == ("lasttoken", 32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dense": True}, each("modules.json", "type", TEI, FASTEMBED, JS)),
        (
            {"pooling": "cls+mean"},
            each("1_Pooling/config.json", "pooling_mode", TEI, FASTEMBED, JS),
        ),
        ({"pooling": "lasttoken"}, each("1_Pooling/config.json", "pooling_mode", FASTEMBED)),
    ],
)
def test_modules_that_readers_lack(tmp_path, options, expected):
    model = write_checkpoint(tmp_path / "c", **options)
    keys = (("modules.json", "type"), ("1_Pooling/config.json", "pooling_mode"))
    assert {f for f in findings(model) if f[:2] in keys} == expected


@pytest.mark.parametrize("name", ["my_code.Pooling", "sentence_transformers.models.LSTM"])
def test_modules_that_only_sentence_transformers_knows(model, name):
    modules = read_json(model / "modules.json")
    write_json(model / "modules.json", [*modules, {"idx": 3, "path": "3_X", "type": name}])
    assert findings(model) == each("modules.json", "type", ST, TEI, FASTEMBED, JS)
    assert [f.change for f in diagnose(model)] == [None]


def test_a_pooling_file_older_than_the_later_modes(model):
    file = "1_Pooling/config.json"
    later = ["pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken", "include_prompt"]
    change_json(model / file, **dict.fromkeys(later))
    assert diagnose(model) == []
    change_json(model / file, pooling_mode_mean_tokens=False)
    assert findings(model) == each(file, "pooling_mode", ST, TEI)
    change_json(model / file, pooling_mode_mean_tokens=True, pooling_mode_cls_token=None)
    assert findings(model) == each(file, "pooling_mode_cls_token", ST, TEI)


def test_a_classifier(model):
    change_json(model / "config.json", architectures=["BertForSequenceClassification"])
    assert findings(model) == each("config.json", "architectures", TEI)


# ONNX files


def write_onnx(path, inputs=("input_ids",), kind=TensorProto.INT64, output="last_hidden_state",
               output_kind=TensorProto.FLOAT, axes=3):  # fmt: skip
    """Write a graph that casts its first input and gives it as many axes."""
    expand = helper.make_node("Unsqueeze", ["cast", "axes"], [output])
    nodes = [
        helper.make_node("Cast", [inputs[0]], ["cast"], to=output_kind),
        expand if axes == 3 else helper.make_node("Identity", ["cast"], [output]),
    ]
    typed = [helper.make_tensor_value_info(name, kind, ["batch", "tokens"]) for name in inputs]
    outputs = [helper.make_tensor_value_info(output, output_kind, [None] * axes)]
    constants = [helper.make_tensor("axes", TensorProto.INT64, [1], [2])]
    graph = helper.make_graph(nodes, "g", typed, outputs, constants if axes == 3 else [])
    opset = helper.make_opsetid("", 14)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


ALL = (ST, FASTEMBED, TEI, JS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"kind": TensorProto.INT32}, [("input input_ids", *ALL)]),
        ({"inputs": ["ids"]}, [("inputs", *ALL), ("input ids", *ALL)]),
        ({"inputs": ["input_ids", "positions"]}, [("input positions", *ALL)]),
        ({"output": "hidden"}, [("outputs", ST, JS)]),
        ({"output": "logits"}, [("outputs", ST)]),
        ({"axes": 2}, [("output last_hidden_state", FASTEMBED)]),
        ({"output_kind": TensorProto.FLOAT16}, [("output last_hidden_state", TEI)]),
    ],
)
def test_inputs_and_outputs(model, options, expected):
    write_onnx(model / "onnx/model.onnx", **options)
    assert findings(model) == set().union(*(each("onnx/model.onnx", *row) for row in expected))


def test_a_quantized_file_alone_and_one_outside_of_onnx(model):
    (model / "onnx/model.onnx").rename(model / "model")
    assert findings(model) == each("onnx/model.onnx", None, ST, TEI, JS)
    (model / "model").rename(model / "model.onnx")
    assert findings(model) == each("model.onnx", None, JS)
    (model / "onnx/model.onnx").write_bytes(b"no graph")
    assert findings(model) == each("onnx/model.onnx", None, *ALL)


# damaged files, links


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000, b'{"a": '])
@pytest.mark.parametrize("name", ["tokenizer.json", "modules.json", "1_Pooling/config.json"])
def test_a_damaged_file(model, name, content):
    (model / name).write_bytes(b"{}" if (name, content) == ("modules.json", b"[1]") else content)
    assert {f for f in findings(model) if f[0] == name} == each(name, None, *READERS)
    repair(model, diagnose(model))
    assert each(name, None, *READERS) <= findings(model)


def test_a_file_that_utf_8_cannot_hold(model):
    change_json(model / "tokenizer_config.json", model_max_length=512, x="\ud800")
    with pytest.raises(ArtifactError, match="surrogates"):
        repair(model, diagnose(model))


def test_several_wheels_of_onnxruntime(model, monkeypatch):
    monkeypatch.setattr(hardware, "WHEELS", ["numpy", "scipy", "no-such-package"])
    assert findings(model) == each("onnxruntime", None, OURS, FASTEMBED, ST)


def test_links_out_of_the_directory_are_not_read(model, tmp_path):
    outside = tmp_path / "outside.json"
    (model / "tokenizer.json").rename(outside)
    (model / "tokenizer.json").symlink_to(outside)
    assert each("tokenizer.json", None, *READERS) <= findings(model)
    write_json(model / "modules.json", [{"path": "../..", "type": "sentence_transformers.models.Pooling"}])  # fmt: skip
    assert Directory(model).table("../outside.json") == {}
    assert all(f.change is None for f in diagnose(model) if ".." in f.file)


def test_a_file_is_not_written_through_a_link_of_its_directory(model, tmp_path):
    (model / "1_Pooling").rename(tmp_path / "elsewhere")
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    other = diagnose(write_checkpoint(tmp_path / "c", schema="new"))
    before = (tmp_path / "elsewhere/config.json").read_bytes()
    with pytest.raises(ArtifactError, match="leads out"):
        repair(model, [f for f in other if f.file == "1_Pooling/config.json"])
    assert (tmp_path / "elsewhere/config.json").read_bytes() == before


def test_blobs_of_the_hub_cache_are_not_changed(model, tmp_path):
    cache = tmp_path / "models--x/snapshots/1"
    shutil.copytree(model, cache)
    blob = tmp_path / "models--x/blobs/b"
    blob.parent.mkdir()
    change_json(cache / "tokenizer_config.json", model_max_length=512)
    (cache / "tokenizer_config.json").rename(blob)
    (cache / "tokenizer_config.json").symlink_to(blob)
    before = blob.read_bytes()
    assert repair(cache, diagnose(cache)) == ["tokenizer_config.json"]
    assert diagnose(cache) == []
    assert blob.read_bytes() == before


# artifacts


def make_stale(directory):
    """Let an artifact state 512 tokens, with a matching manifest, as an older program wrote it."""
    path = directory / "tokenizer_config.json"
    change_json(path, model_max_length=512)
    manifest = read_json(directory / "onnxsim_embed.json")
    manifest["files"][path.name] = {"sha256": sha256(path), "size": path.stat().st_size}
    write_json(directory / "onnxsim_embed.json", manifest)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_fixed_artifact_matches_its_manifest(copy, artifact, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links")))
    make_stale(copy)
    assert repair(copy, diagnose(copy)) == ["tokenizer_config.json"]
    assert diagnose(copy) == []
    assert repair(copy, []) == []
    Artifact.open(copy).check()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["copy"]
    texts = ["a road", "the sun"]
    np.testing.assert_array_equal(Embedder(copy).encode(texts), Embedder(artifact).encode(texts))


def test_a_missing_file_of_an_artifact_is_written_a_damaged_one_gets_no_new_digest(copy):
    (copy / "special_tokens_map.json").unlink()
    assert findings(copy) == each("special_tokens_map.json", None, OURS, FASTEMBED)
    repair(copy, diagnose(copy))
    Artifact.open(copy).check()
    change_json(copy / "tokenizer_config.json", model_max_length=512)
    before = (copy / "onnxsim_embed.json").read_bytes()
    with pytest.raises(ArtifactError, match="damaged"):
        repair(copy, diagnose(copy))
    assert (copy / "onnxsim_embed.json").read_bytes() == before


# the command


def test_the_command_prints_findings_and_fixes_them(run, succeed, model):
    change_json(model / "tokenizer_config.json", model_max_length=512)
    code, out, err = run("doctor", model)
    assert (code, err) == (1, "")
    title, readers, effect, fix, last = [line for line in out.splitlines() if line]
    assert title == "tokenizer_config.json: model_max_length"
    assert readers.split(None, 1) == ["breaks", "fastembed, transformers.js"]
    assert "512" in effect
    assert fix.endswith("set it to 48")
    assert "1 finding;" in last
    out = succeed("doctor", model, "--fix")
    assert out.splitlines()[0] == f"Wrote {model / 'tokenizer_config.json'}."
    succeed("doctor", model)


def test_only_the_named_readers_count_and_nothing_controls_the_terminal(
    run, succeed, reject, model
):
    change_json(model / "config.json", architectures=["\x1b[31mClassification"])
    succeed("doctor", model, "--reader", "fastembed")
    code, out, _ = run("doctor", model, "--reader", "text-embeddings-inference")
    assert (code, "\x1b" in out) == (1, False)
    assert ", ".join(READERS) in reject("doctor", model, "--reader", "fast")
