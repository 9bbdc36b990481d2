"""doctor: each way in which a directory breaks a reader is named, and mended where it can be."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import write_checkpoint, write_json

from onnxsim_embed import Embedder
from onnxsim_embed.artifact.manifest import Artifact
from onnxsim_embed.doctor import READERS, diagnose, repair
from onnxsim_embed.doctor.place import FASTEMBED, JS, OURS, ST, TEI, TOKENIZERS, Place
from onnxsim_embed.errors import ArtifactError


@pytest.fixture
def place(artifact, tmp_path):
    """A directory that breaks nobody, without a manifest: any file of it may be changed."""
    shutil.copytree(artifact, tmp_path / "place")
    (tmp_path / "place/onnxsim_embed.json").unlink()
    return tmp_path / "place"


@pytest.fixture
def copy(artifact, tmp_path):
    """An artifact of its own."""
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


def change(path, drop=(), **values):
    table = json.loads(path.read_text()) | values
    write_json(path, {key: value for key, value in table.items() if key not in drop})


def found(place, **options):
    return {(f.file, f.key): f for f in diagnose(place, **options)}


def test_an_artifact_breaks_nobody(artifact, place):
    assert diagnose(artifact) == []
    assert diagnose(place) == []


BAKED = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_token": "[PAD]"}
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
MENDED = {
    "padding": ("tokenizer.json", "padding", FASTEMBED, {"padding": BAKED}),
    "truncation": ("tokenizer.json", "truncation", TOKENIZERS, {"truncation": CUT}),
    "long": ("tokenizer_config.json", "model_max_length", JS, {"model_max_length": 512}),
    "endless": ("tokenizer_config.json", "model_max_length", FASTEMBED, {"model_max_length": 1e30}),
    "short": ("tokenizer_config.json", "max_length", FASTEMBED, {"max_length": 8}),
    "none": ("sentence_bert_config.json", "max_seq_length", TEI, {"max_seq_length": 4096}),
}


@pytest.mark.parametrize(("file", "key", "reader", "values"), MENDED.values(), ids=MENDED)
def test_stale_keys_are_named_and_mended_and_the_others_stay(place, file, key, reader, values):
    if key != "max_seq_length":
        right = json.loads((place / file).read_text())
        change(place / file, **values)
    else:  # beyond what the model has positions for: nothing else says 48 then
        right = json.loads((place / file).read_text()) | {"max_seq_length": 64}
        change(place / file, **values)
        change(place / "tokenizer_config.json", model_max_length=64)
    finding = found(place)[file, key]
    assert reader in finding.readers
    assert repair(place, diagnose(place)) == [file]
    assert diagnose(place) == []
    assert json.loads((place / file).read_text()) == right


def test_a_pad_token_is_found_by_its_id(place):
    change(place / "tokenizer_config.json", drop=["pad_token"])
    change(place / "special_tokens_map.json", drop=["pad_token"])
    assert found(place)["tokenizer_config.json", "pad_token"].readers == (FASTEMBED,)
    repair(place, diagnose(place))
    assert json.loads((place / "tokenizer_config.json").read_text())["pad_token"] == "[PAD]"


def test_a_missing_special_tokens_map_is_written(place):
    path = place / "special_tokens_map.json"
    right = json.loads(path.read_text())
    path.unlink()
    assert found(place)["special_tokens_map.json", None].readers == (FASTEMBED,)
    repair(place, diagnose(place))
    assert json.loads(path.read_text()) == right


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("config.json", (ST, FASTEMBED, TEI, JS)),
        ("tokenizer.json", (FASTEMBED, TEI, JS)),
        ("tokenizer_config.json", (FASTEMBED, JS)),
    ],
)
def test_a_missing_file_is_named_with_the_next_step(place, name, readers):
    (place / name).unlink()
    finding = found(place)[name, None]
    assert finding.readers == readers
    assert f"onnxsim-embed export {place} -o NEW_DIRECTORY" in finding.remedy
    assert finding.change is None


# modules


def test_missing_modules_are_written_where_nothing_is_in_doubt(place):
    path = place / "modules.json"
    right = json.loads(path.read_text())
    path.unlink()
    assert found(place)["modules.json", None].readers == (ST,)
    repair(place, diagnose(place))
    assert json.loads(path.read_text()) == right


def test_missing_modules_are_not_guessed(place):
    (place / "modules.json").unlink()
    (place / "2_Normalize").rmdir()  # lost in a copy, or never there
    finding = found(place)["modules.json", None]
    assert finding.change is None
    assert "--pooling" in finding.remedy


def test_a_missing_pooling_is_not_guessed(tmp_path):
    write_checkpoint(tmp_path / "c", pooling=None)
    found_there = found(tmp_path / "c")
    assert found_there["1_Pooling/config.json", None].readers == (TEI,)
    assert found_there["modules.json", None].change is None


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_new_schema_files_become_those_of_both_generations(tmp_path, pooling):
    place = write_checkpoint(tmp_path / "c", schema="new", pooling=pooling)
    before = found(place)
    assert before["1_Pooling/config.json", "pooling_mode_cls_token"].readers == (ST, TEI)
    assert ("modules.json", "type") in before
    assert before["sentence_bert_config.json", "max_seq_length"].readers == (TEI,)
    repair(place, diagnose(place))
    assert list(found(place)) == [("onnx/model.onnx", None)]
    table = json.loads((place / "1_Pooling/config.json").read_text())
    chosen = [key for key, value in table.items() if value is True and key != "include_prompt"]
    key = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[pooling]
    assert chosen == [f"pooling_mode_{key}"]
    assert (table["pooling_mode"], table["word_embedding_dimension"]) == (pooling, 32)


@pytest.mark.parametrize("options", [{"dense": True}, {"pooling": "max"}, {"pooling": "cls+mean"}])
def test_what_a_server_cannot_do_is_named(tmp_path, options):
    place = write_checkpoint(tmp_path / "c", **options)
    assert [f for f in diagnose(place, [TEI]) if "another reader" in f.remedy]


def test_a_file_from_before_the_later_poolings_breaks_nobody(place):
    later = ["pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken", "include_prompt"]
    change(place / "1_Pooling/config.json", drop=later)
    assert diagnose(place) == []
    change(place / "1_Pooling/config.json", drop=["pooling_mode_cls_token"])
    assert found(place)["1_Pooling/config.json", "pooling_mode_cls_token"].readers == (ST, TEI)


def test_a_classifier_s_name_is_found(place):
    change(place / "config.json", architectures=["BertForSequenceClassification"])
    assert found(place)["config.json", "architectures"].readers == (TEI,)


# graphs


def write_graph(path, inputs=(("input_ids", TensorProto.INT64),), output="last_hidden_state",
                kind=TensorProto.FLOAT, axes=3):  # fmt: skip
    names = ["batch", "sequence", "hidden"][:axes]
    nodes = [helper.make_node("Cast", [inputs[0][0]], ["x"], to=kind)]
    axis = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    if axes == 3:
        nodes.append(helper.make_node("Unsqueeze", ["x", "axes"], [output]))
    else:
        nodes.append(helper.make_node("Identity", ["x"], [output]))
    taken = [helper.make_tensor_value_info(n, k, ["batch", "sequence"]) for n, k in inputs]
    given = [helper.make_tensor_value_info(output, kind, names)]
    graph = helper.make_graph(nodes, "g", taken, given, [axis] if axes == 3 else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)


GRAPHS = {
    "int32": ({"inputs": [("input_ids", TensorProto.INT32)]}, "input input_ids", ST),
    "name": ({"inputs": [("ids", TensorProto.INT64)]}, "inputs", TEI),
    "output": ({"output": "hidden"}, "outputs", ST),
    "axes": ({"axes": 2}, "output last_hidden_state", FASTEMBED),
    "half": ({"kind": TensorProto.FLOAT16}, "output last_hidden_state", TEI),
}


@pytest.mark.parametrize(("options", "key", "reader"), GRAPHS.values(), ids=GRAPHS)
def test_inputs_and_outputs_that_readers_do_not_take_are_named(place, options, key, reader):
    write_graph(place / "onnx/model.onnx", **options)
    assert reader in found(place)["onnx/model.onnx", key].readers


def test_the_plain_graph_of_these_tests_breaks_nobody(place):
    write_graph(place / "onnx/model.onnx")
    assert diagnose(place) == []


def test_a_quantized_file_alone_is_not_enough(place):
    (place / "onnx/model.onnx").unlink()
    finding = found(place)["onnx/model.onnx", None]
    assert finding.readers == (ST, TEI, JS)
    assert "PyTorch, without a word" in finding.effect


def test_a_file_in_another_place_and_a_damaged_one_are_named(place):
    (place / "onnx/model.onnx").rename(place / "model.onnx")
    assert found(place)["model.onnx", None].readers == (JS,)
    (place / "onnx/model.onnx").write_bytes(b"no graph")
    assert "does not load" in found(place)["onnx/model.onnx", None].effect


# damage, links


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000, b'{"a": '])
@pytest.mark.parametrize("name", ["tokenizer.json", "modules.json", "1_Pooling/config.json"])
def test_a_damaged_file_is_a_finding(place, name, content):
    (place / name).write_bytes(b"{}" if (name, content) == ("modules.json", b"[1]") else content)
    assert "cannot be read" in found(place)[name, None].effect


def test_links_out_of_the_directory_are_not_read(place, tmp_path):
    outside = tmp_path / "outside.json"
    (place / "tokenizer.json").rename(outside)
    (place / "tokenizer.json").symlink_to(outside)
    assert "leads out of the directory" in found(place)["tokenizer.json", None].effect
    write_json(place / "modules.json", [{"path": "../..", "type": "sentence_transformers.models.Pooling"}])  # fmt: skip
    assert Place(place).table("../outside.json") == {}
    assert any("leads out" in f.effect or f.change is None for f in diagnose(place))


def test_a_file_is_not_written_through_a_link_of_its_directory(place, tmp_path):
    (place / "1_Pooling").rename(tmp_path / "elsewhere")
    (place / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    findings = [found(write_checkpoint(tmp_path / "c", schema="new"))["1_Pooling/config.json", "pooling_mode_cls_token"]]  # fmt: skip
    before = (tmp_path / "elsewhere/config.json").read_bytes()
    with pytest.raises(ArtifactError, match="is not written: it leads out"):
        repair(place, findings)
    assert (tmp_path / "elsewhere/config.json").read_bytes() == before


def test_the_hub_s_cache_is_made_of_links_and_its_blobs_are_not_changed(place, tmp_path):
    cache = tmp_path / "models--x/snapshots/1"
    shutil.copytree(place, cache)
    blob = tmp_path / "models--x/blobs/b"
    blob.parent.mkdir()
    change(cache / "tokenizer_config.json", model_max_length=512)
    (cache / "tokenizer_config.json").rename(blob)
    (cache / "tokenizer_config.json").symlink_to(blob)
    before = blob.read_bytes()
    assert repair(cache, diagnose(cache)) == ["tokenizer_config.json"]
    assert diagnose(cache) == []
    assert blob.read_bytes() == before


# artifacts


def stale(directory):
    """Let an artifact say, as an older program wrote it, that texts have up to 512 tokens."""
    change(directory / "tokenizer_config.json", model_max_length=512)
    manifest = json.loads((directory / "onnxsim_embed.json").read_text())
    content = (directory / "tokenizer_config.json").read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest["files"]["tokenizer_config.json"] = entry
    write_json(directory / "onnxsim_embed.json", manifest)


def test_an_artifact_that_was_mended_is_whole(copy, artifact):
    stale(copy)
    assert repair(copy, diagnose(copy)) == ["tokenizer_config.json"]
    assert diagnose(copy) == []
    Artifact.open(copy).check()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["copy"]
    texts = ["a road", "the sun"]
    np.testing.assert_array_equal(Embedder(copy).encode(texts), Embedder(artifact).encode(texts))


def test_a_missing_file_of_an_artifact_is_written(copy):
    (copy / "special_tokens_map.json").unlink()
    assert {f.readers for f in diagnose(copy)} == {(OURS,), (FASTEMBED,)}
    repair(copy, diagnose(copy))
    Artifact.open(copy).check()


def test_a_damaged_file_of_an_artifact_is_not_given_a_new_digest(copy):
    change(copy / "tokenizer_config.json", model_max_length=512)
    before = (copy / "onnxsim_embed.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"is damaged: .*export the model again"):
        repair(copy, diagnose(copy))
    assert (copy / "onnxsim_embed.json").read_bytes() == before


# the command line


def test_the_command_names_what_it_found_and_mends_it(run, place):
    change(place / "tokenizer_config.json", model_max_length=512)
    code, out, err = run("doctor", place)
    assert (code, err) == (1, "")
    title, *lines, last = [line for line in out.splitlines() if line]
    assert title == "tokenizer_config.json: model_max_length"
    assert lines[0].split(None, 1) == ["breaks", "fastembed, transformers.js"]
    assert "cuts texts at 512 tokens; the model takes 48" in lines[1]
    assert lines[2].endswith("set it to 48")
    assert last == f"{place}: 1 finding; --fix writes the changes of 1."
    code, out, err = run("doctor", place, "--fix")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"Wrote {place / 'tokenizer_config.json'}."
    assert run("doctor", place)[0] == 0


def test_only_the_readers_that_matter_count(run, refuse, place):
    change(place / "tokenizer_config.json", model_max_length=512)
    assert run("doctor", place, "--reader", "text-embeddings-inference")[0] == 0
    assert run("doctor", place, "--reader", "fastembed")[0] == 1
    assert f"known are {', '.join(READERS)}" in refuse("doctor", place, "--reader", "fast")
    assert "is not a directory" in refuse("doctor", place / "none")


def test_what_stands_in_files_cannot_steer_a_terminal(run, place):
    change(place / "config.json", architectures=["\x1b[31mClassification"])
    assert "\x1b" not in run("doctor", place)[1]
