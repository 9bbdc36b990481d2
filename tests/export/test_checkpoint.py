"""What a checkpoint directory says, and what it says wrongly."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import bert_config, bert_tensors, write_checkpoint, write_json

from onnxsim_embed.artifact.recipes import find_recipe
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.export.modules import read_dense
from onnxsim_embed.export.weights import read_tensors
from onnxsim_embed.runtime.pooling import PoolingMode

WORD = "embeddings.word_embeddings.weight"
NORM = "embeddings.LayerNorm.weight"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A fresh tiny checkpoint, free to be spoilt."""
    return write_checkpoint(tmp_path / "tiny", prompts={"query": "a dog "})


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return bert_tensors(bert_config())


def change(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    table = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in table.items() if value is not None})


def change_modules(directory: Path, *modules: tuple[str, str]) -> None:
    write_json(
        directory / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )


# Pooling and modules


@pytest.mark.parametrize("schema", ["legacy", "new"])
@pytest.mark.parametrize("mode", list(PoolingMode), ids=lambda mode: mode.value)
def test_both_pooling_schemas_say_every_mode(tmp_path, schema, mode):
    directory = write_checkpoint(tmp_path / "c", pooling=mode.value, schema=schema)
    assert open_checkpoint(directory).pooling == (mode,)


def test_legacy_booleans_keep_the_order_of_concatenation(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling="mean+cls+max", schema="legacy")
    assert [m.value for m in open_checkpoint(directory).pooling] == ["cls", "max", "mean"]


def test_a_list_of_pooling_modes_keeps_its_own_order(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling="mean+cls+max", schema="new")
    assert [m.value for m in open_checkpoint(directory).pooling] == ["mean", "cls", "max"]


@pytest.mark.parametrize("mode", ["median", ["mean", "median"], 3, None, [["mean"]]])
def test_an_unusable_pooling_mode_names_the_file(tiny, mode):
    write_json(tiny / "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": mode})
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json"):
        open_checkpoint(tiny)


def test_an_unknown_pooling_mode_lists_those_there_are(tiny):
    write_json(tiny / "1_Pooling/config.json", {"pooling_mode": "median"})
    with pytest.raises(CheckpointError, match="'median'; known are mean, cls, max"):
        open_checkpoint(tiny)


def test_pooling_without_the_prompt_is_refused(tiny):
    change(tiny / "1_Pooling/config.json", include_prompt=False)
    with pytest.raises(CheckpointError, match="include_prompt"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("missing", ["modules.json", "booleans", "Pooling"])
def test_a_checkpoint_without_pooling_asks_for_it(tiny, missing):
    if missing == "modules.json":
        (tiny / "modules.json").unlink()
    elif missing == "booleans":
        write_json(tiny / "1_Pooling/config.json", {"word_embedding_dimension": 32})
    else:
        change_modules(tiny, ("", "Transformer"), ("2_Normalize", "Normalize"))
    with pytest.raises(CheckpointError, match="pooling="):
        open_checkpoint(tiny)


def test_a_missing_pooling_config_is_named(tiny):
    (tiny / "1_Pooling/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json is missing"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("recipe", [None, "bge-base-en"])
def test_explicit_pooling_wins(tiny, recipe):
    found = open_checkpoint(tiny, pooling="max", recipe=recipe and find_recipe(recipe))
    assert found.pooling == (PoolingMode.MAX,)
    assert found.normalize


def test_an_unknown_explicit_pooling_is_a_wrong_argument(tiny):
    with pytest.raises(ValueError, match="unknown pooling 'median'; known are mean"):
        open_checkpoint(tiny, pooling="median")


@pytest.mark.parametrize("schema", ["legacy", "new"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_modules_after_pooling_are_read(tmp_path, schema, normalize, dense):
    found = open_checkpoint(
        write_checkpoint(tmp_path / "c", schema=schema, normalize=normalize, dense=dense)
    )
    assert found.normalize is normalize
    assert found.dense == (("2_Dense",) if dense else ())


def test_the_transformer_may_live_in_a_subfolder(tiny):
    inside = tiny / "0_Transformer"
    inside.mkdir()
    for path in list(tiny.iterdir()):
        if path.is_file() and path.name not in (
            "modules.json",
            "config_sentence_transformers.json",
        ):
            path.rename(inside / path.name)
    change_modules(tiny, ("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"))
    found = open_checkpoint(tiny)
    assert found.transformer == inside
    assert found.max_seq_length == 48
    assert found.prompts == {"query": "a dog "}
    assert WORD in found.tensors()


def test_dropout_does_nothing(tiny):
    change_modules(tiny, ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dropout", "Dropout"))
    assert open_checkpoint(tiny).dense == ()


@pytest.mark.parametrize(
    ("kind", "before"),
    [("Dense", ("2_Normalize", "Normalize")), ("WeightedLayerPooling", ("1_Pooling", "Pooling"))],
)
def test_a_module_that_cannot_be_exported_is_named(tiny, kind, before):
    change_modules(tiny, ("", "Transformer"), before, (f"3_{kind}", kind))
    with pytest.raises(CheckpointError, match=rf"modules.json: module '{kind}'"):
        open_checkpoint(tiny)


@pytest.mark.parametrize(
    "modules",
    [
        [("2_Normalize", "Normalize"), ("1_Pooling", "Pooling")],
        [("2_Dense", "Dense"), ("1_Pooling", "Pooling")],
        [("1_Pooling", "Pooling"), ("1_Pooling", "Pooling")],
    ],
)
def test_modules_in_an_order_that_cannot_be_exported_are_refused(tiny, modules):
    change_modules(tiny, ("", "Transformer"), *modules)
    with pytest.raises(CheckpointError, match=r"modules.json: module .* position"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../other", ".."])
@pytest.mark.parametrize("kind", ["Transformer", "Pooling", "Dense"])
def test_modules_outside_the_checkpoint_are_refused(tiny, kind, path):
    change_modules(tiny, (path, kind))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("text", ["", "no json", '{"a": 1}', '[{"type": "x"}]', "[1]", "null", "7"])
def test_an_unreadable_list_of_modules_is_named(tiny, text):
    (tiny / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules.json"):
        open_checkpoint(tiny)


# Recipes, prompts and names


def test_a_recipe_fills_what_the_checkpoint_does_not_say(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling=None)
    recipe = replace(find_recipe("bge-base-en"), max_seq_length=40)
    found = open_checkpoint(directory, recipe=recipe)
    assert found.pooling == (PoolingMode.CLS,)
    assert found.normalize
    assert found.max_seq_length == 40
    assert found.prompts == recipe.prompts
    assert (found.name, found.source, found.revision) == (
        recipe.name,
        recipe.source,
        recipe.revision,
    )


def test_a_recipe_still_says_whether_to_normalize_when_pooling_is_given(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling=None)
    found = open_checkpoint(directory, pooling="cls", recipe=find_recipe("bge-base-en"))
    assert found.normalize


def test_what_the_checkpoint_says_wins_over_the_recipe(tmp_path):
    prompts = {"query": "a dog "}
    directory = write_checkpoint(tmp_path / "c", normalize=False, prompts=prompts)
    found = open_checkpoint(directory, recipe=find_recipe("bge-base-en"))
    assert found.pooling == (PoolingMode.MEAN,)
    assert not found.normalize
    assert found.max_seq_length == 48
    assert found.prompts == prompts


def test_without_a_recipe_the_directory_gives_the_name(tiny):
    found = open_checkpoint(tiny)
    assert (found.name, found.source, found.revision) == ("tiny", "tiny", None)


def test_prompts_default_and_similarity_are_read(tiny):
    change(
        tiny / "config_sentence_transformers.json",
        prompts={"query": "q: ", "document": "", "old": None},
        default_prompt_name="query",
        similarity_fn_name="dot",
    )
    found = open_checkpoint(tiny)
    assert found.prompts == {"query": "q: ", "document": ""}
    assert found.default_prompt_name == "query"
    assert found.similarity_fn_name == "dot"


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": ["query: "]},
        {"prompts": "query: "},
        {"prompts": {"query": 3}},
        {"default_prompt_name": "passage"},
        {"similarity_fn_name": "hamming"},
    ],
    ids=str,
)
def test_impossible_prompts_and_similarities_name_their_file(tiny, wrong):
    change(tiny / "config_sentence_transformers.json", **wrong)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers.json.*" + min(wrong)):
        open_checkpoint(tiny)


def test_a_plain_checkpoint_has_no_prompts_and_cosine(tmp_path):
    found = open_checkpoint(write_checkpoint(tmp_path / "c", pooling=None), pooling="mean")
    assert found.prompts == {}
    assert found.default_prompt_name is None
    assert found.similarity_fn_name == "cosine"
    assert not found.normalize


# Lengths


@pytest.mark.parametrize(
    ("stated", "tokenizer", "positions", "expected"),
    [
        (48, 512, 64, 48),
        (100, 512, 64, 64),
        (48, 30, 64, 48),
        (48, None, None, 48),
        (None, 40, 64, 40),
        (None, 512, 64, 64),
        (None, 1e30, 64, 64),
        (None, int(1e30), 64, 64),
        (None, None, 64, 64),
        ("no file", 40, 64, 40),
    ],
)
def test_the_maximum_length_is_the_first_stated_and_fits_the_positions(
    tiny, stated, tokenizer, positions, expected
):
    if stated == "no file":
        (tiny / "sentence_bert_config.json").unlink()
    else:
        change(tiny / "sentence_bert_config.json", max_seq_length=stated)
    change(tiny / "tokenizer_config.json", model_max_length=tokenizer)
    change(tiny / "config.json", max_position_embeddings=positions)
    assert open_checkpoint(tiny).max_seq_length == expected


@pytest.mark.parametrize("stated", ["48", 2, 0, -1, True, [48]])
def test_a_stated_length_that_is_none_is_named_rather_than_ignored(tiny, stated):
    change(tiny / "sentence_bert_config.json", max_seq_length=stated)
    with pytest.raises(CheckpointError, match="max_seq_length"):
        open_checkpoint(tiny)


def test_the_new_schema_takes_the_length_from_the_tokenizer(tmp_path):
    directory = write_checkpoint(tmp_path / "c", schema="new", max_seq_length=31)
    assert open_checkpoint(directory).max_seq_length == 31


def test_a_checkpoint_without_any_length_says_where_it_looked(tiny):
    change(tiny / "sentence_bert_config.json", max_seq_length=None)
    change(tiny / "tokenizer_config.json", model_max_length=1e30)
    change(tiny / "config.json", max_position_embeddings=None)
    with pytest.raises(CheckpointError, match="no maximum length"):
        open_checkpoint(tiny)


def test_other_names_of_the_transformer_config_are_read(tiny):
    (tiny / "sentence_bert_config.json").rename(tiny / "sentence_roberta_config.json")
    change(tiny / "sentence_roberta_config.json", max_seq_length=20, do_lower_case=True)
    found = open_checkpoint(tiny)
    assert found.max_seq_length == 20
    assert found.do_lower_case


# Missing and damaged files


def test_a_path_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '"x"', "\xff"])
def test_an_unreadable_config_is_named(tiny, text):
    (tiny / "config.json").unlink()
    if text is not None:
        (tiny / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_checkpoint(tiny)


def test_a_checkpoint_without_a_tokenizer_says_which_files_it_lacks(tiny):
    (tiny / "tokenizer.json").unlink()
    (tiny / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer: .*tokenizer.json, vocab.txt"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_one_tokenizer_file_is_enough(tiny, name):
    (tiny / name).unlink()
    assert open_checkpoint(tiny).max_seq_length == 48


# Weights


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def old_names(name: str) -> str:
    if "LayerNorm" not in name:
        return name
    return name.replace(".weight", ".gamma").replace(".bias", ".beta")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"bert.{name}",
        lambda name: f"model.{name}",
        lambda name: f"0.auto_model.{name}",
        lambda name: f"bert.{old_names(name)}",
    ],
    ids=["plain", "bert", "model", "auto_model", "gamma-beta"],
)
def test_weights_come_under_plain_names(tmp_path, tensors, rename):
    save_file({rename(k): v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert same(read_tensors(tmp_path), tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_float_types_become_float32(tmp_path, tensors, dtype):
    stored = {k: v.astype(dtype) for k, v in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path)
    assert {v.dtype for v in found.values()} == {np.dtype(np.float32)}
    assert same(found, {k: v.astype(np.float32) for k, v in stored.items()})


def test_bfloat16_becomes_float32(tmp_path, tensors):
    import torch
    from safetensors.torch import save_file as save_torch

    stored = {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in tensors.items()}
    save_torch(stored, tmp_path / "model.safetensors")
    assert same(read_tensors(tmp_path), {k: v.float().numpy() for k, v in stored.items()})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_pytorch_file_is_read_through_pytorch(tmp_path, tensors, dtype):
    import torch

    stored = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in tensors.items()}
    torch.save(
        stored | {"embeddings.position_ids": torch.arange(64)}, tmp_path / "pytorch_model.bin"
    )
    assert same(read_tensors(tmp_path), {k: v.float().numpy() for k, v in stored.items()})


def test_safetensors_come_before_a_pytorch_file(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert same(read_tensors(tmp_path), tensors)


def test_a_pytorch_file_that_runs_code_is_refused(tmp_path):
    import torch

    torch.save({"x": Path("code")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin cannot be read with weights_only"
    ):
        read_tensors(tmp_path)


def test_a_pytorch_file_without_pytorch_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install torch"):
        read_tensors(tmp_path)


def shard(directory: Path, tensors: dict[str, np.ndarray]) -> Path:
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, directory / file)
        weight_map |= dict.fromkeys(half, file)
    index = directory / "model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": weight_map})
    return index


def test_shards_are_read_through_their_index(tmp_path, tensors):
    shard(tmp_path, tensors)
    assert same(read_tensors(tmp_path), tensors)


def test_a_missing_shard_is_named(tmp_path, tensors):
    shard(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_outside_the_directory_are_refused(tmp_path, tensors, name):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {WORD: name}})
    with pytest.raises(CheckpointError, match="outside its directory"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [[], "x", None, 3])
def test_a_shard_index_of_another_form_is_named(tmp_path, weight_map):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        read_tensors(tmp_path)


def test_integer_buffers_are_ignored(tmp_path, tensors):
    buffer = {"embeddings.position_ids": np.arange(64)[None]}
    save_file(tensors | buffer, tmp_path / "model.safetensors")
    assert same(read_tensors(tmp_path), tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, tensors, value, dtype):
    tensors[NORM][3] = value
    save_file({k: v.astype(dtype) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{NORM}'.* NaN or infinite"):
        read_tensors(tmp_path)


def test_a_float64_beyond_float32_is_not_finite(tmp_path, tensors):
    wide = {k: v.astype(np.float64) for k, v in tensors.items()}
    wide[NORM][3] = 1e300
    save_file(wide, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=NORM):
        read_tensors(tmp_path)


def test_missing_weights_list_the_files_that_were_looked_for(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: .*model.safetensors"):
        open_checkpoint(tiny).tensors()


@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x" * 99])
def test_a_damaged_safetensors_file_is_named(tiny, spoil):
    path = tiny / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a readable safetensors"):
        open_checkpoint(tiny).tensors()


def test_a_damaged_pytorch_file_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"no zip, no pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be read"):
        read_tensors(tmp_path)


# Dense


@pytest.fixture
def dense(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "dense", dense=True) / "2_Dense"


def test_dense_is_read_transposed(dense):
    weight, bias, activation = read_dense(dense)
    assert weight.shape == (32, 16)
    assert bias is not None
    assert bias.shape == (16,)
    assert activation == "torch.nn.modules.activation.Tanh"


def test_a_pytorch_file_of_dense_reads_the_same(dense):
    import torch
    from safetensors.torch import load_file

    expected = read_dense(dense)
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    found = read_dense(dense)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize(
    "setting", [{"use_residual": True}, {"module_input_name": "token_embeddings"}]
)
def test_a_dense_module_of_another_kind_is_refused(dense, setting):
    change(dense / "config.json", **setting)
    with pytest.raises(CheckpointError, match=r"2_Dense.* not supported"):
        read_dense(dense)


def test_dense_without_weights_names_what_it_lacks(dense):
    save_file({"linear.bias": np.zeros(16, np.float32)}, dense / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2_Dense has no tensor linear.weight"):
        read_dense(dense)
    (dense / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2_Dense has no weights"):
        read_dense(dense)


def test_a_vanished_directory_is_one_clear_error(tiny):
    found = open_checkpoint(tiny)
    shutil.rmtree(tiny)
    with pytest.raises(CheckpointError, match="no weights"):
        found.tensors()


@pytest.mark.parametrize(
    ("kind", "pad", "positions", "length"),
    [
        ("roberta", 1, 514, 512),
        ("xlm-roberta", 1, 514, 512),
        ("mpnet", 1, 514, 512),
        ("bert", 0, 512, 512),
        ("distilbert", 0, 512, 512),
        ("modernbert", 50283, 8192, 8192),
    ],
)
def test_positions_after_the_padding_s_make_texts_shorter(tmp_path, kind, pad, positions, length):
    config = bert_config(model_type=kind, pad_token_id=pad, max_position_embeddings=positions)
    directory = write_checkpoint(tmp_path / "c", config=config, tensors={}, max_seq_length=10_000)
    assert open_checkpoint(directory).max_seq_length == length


def test_sharded_pickles_are_read_and_stay_inside(tmp_path):
    import torch

    directory = write_checkpoint(tmp_path / "c")
    expected = open_checkpoint(directory).tensors()
    raw = {name: torch.from_numpy(value) for name, value in bert_tensors(bert_config()).items()}
    (directory / "model.safetensors").unlink()
    shards = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    where = {}
    for number, (name, value) in enumerate(raw.items()):
        shard = list(shards)[number % 2]
        shards[shard][name] = value
        where[name] = shard
    for shard, part in shards.items():
        torch.save(part, directory / shard)
    index = directory / "pytorch_model.bin.index.json"
    write_json(index, {"weight_map": where})
    tensors = open_checkpoint(directory).tensors()
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    write_json(index, {"weight_map": {"a": "../outside.bin"}})
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_checkpoint(directory).tensors()
