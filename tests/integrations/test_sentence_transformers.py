"""A SentenceTransformer on our models, with versions 5 and 6 of its library (`make interop`)."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from support import TEXTS, change_json, run_usage, write_checkpoint

from onnxsim_embed import Embedder
from onnxsim_embed.export import export_model

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

import sentence_transformers
import torch

from onnxsim_embed.integrations.sentence_transformers import OnnxEncoder, load

# Names and formats that version 6 has deprecated, and processes that it ends while they wait.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def embedder(artifact):
    return Embedder(artifact, precision="fp32", threads=2)


@pytest.fixture
def model(artifact):
    return load(artifact, precision="fp32", threads=2)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """The same checkpoint on PyTorch. Read-only."""
    return sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")


def test_it_is_a_sentence_transformer_with_the_models_properties(model, theirs):
    assert isinstance(model, sentence_transformers.SentenceTransformer)
    assert isinstance(model[0], OnnxEncoder)
    assert model[0].embedder.threads == 2
    for name in [
        "max_seq_length",
        "device",
        "similarity_fn_name",
        "prompts",
        "default_prompt_name",
    ]:
        assert getattr(model, name) == getattr(theirs, name)
    assert model.get_sentence_embedding_dimension() == 32
    assert model.tokenizer("a road")["input_ids"] == theirs.tokenizer("a road")["input_ids"]
    left, right = model.encode(TEXTS[:3]), model.encode(TEXTS[3:5])
    np.testing.assert_allclose(model.similarity(left, right), left @ right.T, atol=1e-6)


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
@pytest.mark.parametrize(
    "options",
    [{}, {"prompt": "the cat "}, {"prompt_name": "query"}, {"batch_size": 2},
     {"precision": "int8"}, {"precision": "ubinary"}, {"normalize_embeddings": True, "truncate_dim": 5}],
    ids=str,
)  # fmt: skip
def test_vectors_are_the_embedders(model, embedder, theirs, method, options):
    vectors = getattr(model, method)(TEXTS, **options)
    expected = getattr(embedder, method)(TEXTS, **options)
    np.testing.assert_array_equal(vectors, expected, strict=True)
    if "precision" not in options:
        np.testing.assert_allclose(vectors, getattr(theirs, method)(TEXTS, **options), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"convert_to_tensor": True}, {"convert_to_numpy": False}, {"output_value": "token_embeddings"},
     {"output_value": None}, {"device": "cpu"}, {"device": "cpu", "convert_to_tensor": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1]], ids=["many", "one"])
def test_results_have_the_form_of_theirs(model, theirs, options, texts):
    ours, expected = model.encode(texts, **options), theirs.encode(texts, **options)
    assert type(ours) is type(expected)
    if isinstance(texts, str):
        ours, expected = [ours], [expected]
    for mine, other in zip(ours, expected, strict=True):
        assert type(mine) is type(other)
        pairs = [(mine, other)]
        if isinstance(mine, dict):
            names = ("sentence_embedding", "input_ids", "attention_mask")
            pairs = [(mine[name], other[name]) for name in names]
        for left, right in pairs:
            assert left.dtype == right.dtype
            np.testing.assert_allclose(left, right, atol=1e-5)


def test_the_models_own_defaults_apply(model, embedder):
    model.long_texts = "mean"
    long = [TEXTS[10]]
    np.testing.assert_array_equal(model.encode(long), embedder.encode(long, long_texts="mean"))
    model.long_texts = "truncate"
    model.truncate_dim = 7
    assert model.encode(TEXTS).shape == (len(TEXTS), 7)
    model.truncate_dim, model.default_prompt_name = 100, "query"  # theirs takes too large ones
    np.testing.assert_array_equal(model.encode(TEXTS), embedder.encode_query(TEXTS))
    model.max_seq_length = 8
    assert model[0].embedder.max_seq_length == 8
    with pytest.raises(ValueError, match="not among the model's prompts"):
        model.encode(TEXTS, prompt_name="pasage")
    assert model.encode([]).shape == (0, 32)
    assert len(model.encode(sentences=TEXTS[:2])) == 2


def test_documents_have_the_prompt_of_the_embedder(artifact):
    """Where it is the "passage" prompt, theirs prepends nothing."""
    embedder = Embedder(artifact, precision="fp32")
    embedder.prompts["passage"] = "read: "
    vectors = load(embedder).encode_document(TEXTS)
    np.testing.assert_array_equal(vectors, embedder.encode(TEXTS, prompt="read: "))


@pytest.mark.parametrize("pooling", ["mean", "cls+max"])
def test_the_module_alone_gives_the_same_vectors(tmp_path, pooling):
    """Among modules of theirs, in their batches, padded, with prompts that are not pooled."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", pooling=pooling, dense=True)
    change_json(checkpoint / "1_Pooling/config.json", include_prompt=False)
    embedder = Embedder(export_model(checkpoint, tmp_path / "artifact", precisions=["fp32"]))
    plain = sentence_transformers.SentenceTransformer(modules=[OnnxEncoder(embedder)], device="cpu")
    for prompt in (None, "the water of "):
        vectors = plain.encode(TEXTS, prompt=prompt, batch_size=5)
        np.testing.assert_array_equal(vectors, embedder.encode(TEXTS, prompt=prompt))
    more = load(embedder)
    more.append(torch.nn.Identity())
    np.testing.assert_array_equal(more.encode(TEXTS), embedder.encode(TEXTS))


def test_the_module_takes_ids_of_any_tokenizer(embedder):
    """Also without this model's special tokens, and rows of padding alone."""
    ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    found = OnnxEncoder(embedder)({"input_ids": ids, "attention_mask": mask})
    assert found["token_embeddings"].shape == (2, 3, 32)
    assert found["sentence_embedding"].norm(dim=1)[0] > 0
    assert not found["token_embeddings"][1].any()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_hold_the_path(model, again):
    model.max_seq_length = 9
    other = again(model)
    assert len(pickle.dumps(model)) < 20_000
    np.testing.assert_array_equal(other.encode(TEXTS), model.encode(TEXTS))


def test_saved_models_load_in_either_way(model, artifact, tmp_path):
    model.max_seq_length = 9
    model.prompts["query"] = "the cat "
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = load(tmp_path / "saved", threads=1)
    plain = sentence_transformers.SentenceTransformer(
        str(tmp_path / "saved"), trust_remote_code=True, device="cpu"
    )
    assert loaded[0].embedder.threads == 1
    assert type(loaded) is type(model)
    for other in (loaded, plain):
        assert other[0].embedder.precision == "fp32"
        np.testing.assert_array_equal(other.encode_query(TEXTS), model.encode_query(TEXTS))
    assert load(tmp_path / "saved", precision="int8")[0].embedder.precision == "int8"


def test_other_processes_return_the_same(model, embedder):
    pool = model.start_multi_process_pool(["cpu"])
    try:
        vectors = model.encode(TEXTS, prompt_name="query", pool=pool, batch_size=3, chunk_size=5)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_array_equal(vectors, embedder.encode_query(TEXTS))


def test_its_usage_runs(artifact):
    assert run_usage(load, artifact) == "torch.Size([1, 1])"
