"""Checkpoint directories: pooling, prompts, lengths, and errors that name the file."""

from dataclasses import replace

import pytest
from support import bert_config, change_json, write_checkpoint, write_json

from onnxsim_embed.artifact.recipes import find_recipe
from onnxsim_embed.errors import CheckpointError
from onnxsim_embed.export.checkpoint import open_checkpoint
from onnxsim_embed.runtime.pooling import PoolingMode

# Pooling, recipes, prompts


@pytest.mark.parametrize("missing", ["modules.json", "booleans"])
def test_pooling_is_never_guessed(tiny, missing):
    if missing == "modules.json":
        (tiny / "modules.json").unlink()
    else:
        write_json(tiny / "1_Pooling/config.json", {"word_embedding_dimension": 32})
    with pytest.raises(CheckpointError, match="pooling="):
        open_checkpoint(tiny)


@pytest.mark.parametrize("recipe", [None, "bge-base-en"])
def test_the_pooling_argument_overrides_checkpoint_and_recipe(tiny, recipe):
    checkpoint = open_checkpoint(tiny, pooling="max", recipe=recipe and find_recipe(recipe))
    assert checkpoint.pooling == (PoolingMode.MAX,)
    assert checkpoint.normalize
    with pytest.raises(ValueError, match=r"'median'.* mean, cls"):
        open_checkpoint(tiny, pooling="median")


def test_a_recipe_applies_where_the_checkpoint_states_nothing(tmp_path):
    directory = write_checkpoint(tmp_path / "c", pooling=None)
    recipe = replace(find_recipe("bge-base-en"), max_seq_length=40)
    checkpoint = open_checkpoint(directory, recipe=recipe)
    assert checkpoint.pooling == (PoolingMode.CLS,)
    assert checkpoint.normalize
    assert checkpoint.max_seq_length == 40
    assert checkpoint.prompts == recipe.prompts
    for name in ("name", "source", "revision"):
        assert getattr(checkpoint, name) == getattr(recipe, name)
    assert open_checkpoint(directory, pooling="cls", recipe=recipe).normalize


def test_the_checkpoint_overrides_the_recipe(tmp_path):
    prompts = {"query": "a dog "}
    directory = write_checkpoint(tmp_path / "c", normalize=False, prompts=prompts)
    checkpoint = open_checkpoint(directory, recipe=find_recipe("bge-base-en"))
    assert checkpoint.pooling == (PoolingMode.MEAN,)
    assert not checkpoint.normalize
    assert checkpoint.max_seq_length == 48
    assert checkpoint.prompts == prompts


def test_defaults_of_a_plain_checkpoint(tmp_path):
    directory = write_checkpoint(tmp_path / "tiny", pooling=None)
    checkpoint = open_checkpoint(directory, pooling="mean")
    assert (checkpoint.name, checkpoint.source, checkpoint.revision) == ("tiny", "tiny", None)
    assert (checkpoint.prompts, checkpoint.default_prompt_name) == ({}, None)
    assert checkpoint.similarity_fn_name == "cosine"
    assert not checkpoint.normalize


def test_prompts_default_and_similarity_are_read(tiny):
    change_json(
        tiny / "config_sentence_transformers.json",
        prompts={"query": "q: ", "document": "", "old": None},
        default_prompt_name="query",
        similarity_fn_name="dot",
    )
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.prompts == {"query": "q: ", "document": ""}
    assert checkpoint.default_prompt_name == "query"
    assert checkpoint.similarity_fn_name == "dot"


CONFIG = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (CONFIG, "prompts", ["query: "]),
        (CONFIG, "prompts", "query: "),
        (CONFIG, "prompts", {"query": 3}),
        (CONFIG, "default_prompt_name", "passage"),
        (CONFIG, "similarity_fn_name", "hamming"),
        # settings that change the computation
        (TRANSFORMER, "transformer_task", "fill-mask"),
        (TRANSFORMER, "module_output_name", "sentence_embedding"),
        (TRANSFORMER, "query_length", 32),
        (TRANSFORMER, "processing_kwargs", {"text": {"max_length": 3}}),
        (TRANSFORMER, "tokenizer_name_or_path", "owner/other"),
        *((TRANSFORMER, "max_seq_length", length) for length in ("48", 2, 0, -1, True, [48])),
    ],
    ids=str,
)
def test_invalid_values_name_their_file_and_key(tiny, file, key, value):
    change_json(tiny / file, **{key: value})
    with pytest.raises(CheckpointError, match=f"{CONFIG}.*{key}" if file == CONFIG else key):
        open_checkpoint(tiny)


# Lengths


@pytest.mark.parametrize(
    ("own", "tokenizer", "positions", "expected"),
    [
        (48, 512, 64, 48),
        (100, 512, 64, 64),
        (48, 30, 64, 48),
        (48, None, None, 48),
        (None, 40, 64, 40),
        (None, 512, 64, 64),
        (None, 1e30, 64, 64),
        (None, None, 64, 64),
        ("no file", 40, 64, 40),
    ],
)
def test_the_maximum_length_is_the_first_stated_and_fits_the_positions(
    tiny, own, tokenizer, positions, expected
):
    if own == "no file":
        (tiny / "sentence_bert_config.json").unlink()
    else:
        change_json(tiny / "sentence_bert_config.json", max_seq_length=own)
    change_json(tiny / "tokenizer_config.json", model_max_length=tokenizer)
    change_json(tiny / "config.json", max_position_embeddings=positions)
    assert open_checkpoint(tiny).max_seq_length == expected


def test_the_new_schema_takes_the_length_from_the_tokenizer(tmp_path):
    directory = write_checkpoint(tmp_path / "c", schema="new", max_seq_length=31)
    assert open_checkpoint(directory).max_seq_length == 31


def test_a_checkpoint_without_any_length_names_the_keys(tiny):
    change_json(tiny / "sentence_bert_config.json", max_seq_length=None)
    change_json(tiny / "tokenizer_config.json", model_max_length=1e30)
    change_json(tiny / "config.json", max_position_embeddings=None)
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        open_checkpoint(tiny)


def test_other_names_of_the_transformer_config_are_read(tiny):
    (tiny / "sentence_bert_config.json").rename(tiny / "sentence_roberta_config.json")
    change_json(tiny / "sentence_roberta_config.json", max_seq_length=20, do_lower_case=True)
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.max_seq_length == 20
    assert checkpoint.do_lower_case


@pytest.mark.parametrize(
    ("kind", "pad", "positions", "length"),
    [("roberta", 1, 514, 512), ("xlm-roberta", 1, 514, 512), ("mpnet", 1, 514, 512),
     ("bert", 0, 512, 512), ("modernbert", 50283, 8192, 8192)],
)  # fmt: skip
def test_positions_that_start_after_the_padding_leave_fewer_tokens(
    tmp_path, kind, pad, positions, length
):
    config = bert_config(model_type=kind, pad_token_id=pad, max_position_embeddings=positions)
    directory = write_checkpoint(tmp_path / "c", config=config, tensors={}, max_seq_length=10_000)
    assert open_checkpoint(directory).max_seq_length == length


# Missing and damaged files


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '"x"', "\xff"])
def test_an_unreadable_config_is_named(tiny, text):
    (tiny / "config.json").unlink()
    if text is not None:
        (tiny / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_checkpoint(tiny)


def test_one_tokenizer_file_is_enough(tiny):
    (tiny / "tokenizer.json").unlink()
    assert open_checkpoint(tiny).max_seq_length == 48
    (tiny / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer: .*tokenizer.json, vocab.txt"):
        open_checkpoint(tiny)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_must_be_merged_first(tiny, name, weights):
    (tiny / name).write_text("{}")
    if not weights:
        (tiny / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*merge_and_unload"):
        open_checkpoint(tiny)
