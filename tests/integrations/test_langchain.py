"""The LangChain adapter, where langchain-core is installed (`make interop` installs it)."""

from __future__ import annotations

import asyncio
import copy
import pickle

import numpy as np
import pytest
from support import TEXTS, run_usage

from onnxsim_embed import Embedder

pytest.importorskip("langchain_core", reason="langchain-core is not installed: make interop")

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from onnxsim_embed.integrations.langchain import OnnxsimEmbeddings


@pytest.fixture
def embeddings(artifact):
    return OnnxsimEmbeddings(artifact, precision="fp32")


@pytest.fixture
def model(artifact):
    return Embedder(artifact, precision="fp32")


def test_documents_and_queries_get_their_own_vectors(embeddings, model):
    assert isinstance(embeddings, Embeddings)
    assert embeddings.embed_documents(TEXTS) == model.encode_document(TEXTS).tolist()
    assert embeddings.embed_query(TEXTS[0]) == model.encode_query(TEXTS[0]).tolist()
    assert embeddings.embed_query(TEXTS[0]) != embeddings.embed_documents(TEXTS[:1])[0]


def test_numbers_are_python_floats(embeddings):
    assert type(embeddings.embed_query("a road")[0]) is float
    assert type(embeddings.embed_documents(["a road"])[0][0]) is float
    assert embeddings.embed_documents([]) == []


def test_async_methods_give_the_same(embeddings):
    async def both():
        return await asyncio.gather(
            embeddings.aembed_documents(TEXTS), embeddings.aembed_query("a road")
        )

    assert asyncio.run(both()) == [
        embeddings.embed_documents(TEXTS),
        embeddings.embed_query("a road"),
    ]


def test_options_reach_the_model(artifact, model):
    embeddings = OnnxsimEmbeddings(
        artifact, precision="fp32", query_prompt="cat ", document_prompt="the ", truncate_dim=5,
        normalize_embeddings=True, batch_size=2, threads=1,
    )  # fmt: skip
    options = {"truncate_dim": 5, "normalize_embeddings": True}
    assert embeddings.embed_query("x") == model.encode("x", prompt="cat ", **options).tolist()
    documents = model.encode(TEXTS, prompt="the ", **options)
    assert embeddings.embed_documents(TEXTS) == documents.tolist()


def test_a_vector_store_finds_with_it(embeddings):
    store = InMemoryVectorStore(embeddings)
    store.add_texts(["solar energy", "the water of the river"])
    assert len(store.similarity_search("river", k=1)) == 1


def test_a_loaded_model_is_used_as_it_is(model):
    embeddings = OnnxsimEmbeddings(model)
    assert embeddings.embed_query("x") == model.encode_query("x").tolist()
    again = pickle.loads(pickle.dumps(embeddings))
    assert again.embed_query("x") == embeddings.embed_query("x")


def test_it_pickles_and_copies_as_its_settings(embeddings):
    expected = embeddings.embed_query("x")
    content = pickle.dumps(embeddings)
    assert len(content) < 2000
    assert pickle.loads(content).embed_query("x") == expected
    assert copy.deepcopy(embeddings).embed_query("x") == expected


def test_the_model_is_loaded_at_first_use(tmp_path):
    embeddings = OnnxsimEmbeddings(tmp_path / "nothing")
    with pytest.raises(Exception, match="nothing"):
        embeddings.embed_query("x")


@pytest.mark.parametrize(
    "documents", [["a", None], "a text", {"a": 1}, {"a"}, b"a", np.array([["a"]])]
)
def test_only_lists_of_texts_are_documents(embeddings, documents):
    with pytest.raises(TypeError):
        embeddings.embed_documents(documents)


@pytest.mark.parametrize("query", [["a", "b"], None, b"a"])
def test_only_a_string_is_a_query(embeddings, query):
    with pytest.raises(TypeError, match="string"):
        embeddings.embed_query(query)


def test_an_unknown_option_is_a_type_error(artifact):
    with pytest.raises(TypeError, match="batchsize"):
        OnnxsimEmbeddings(artifact, batchsize=3)


def test_its_usage_runs(artifact):
    assert run_usage(OnnxsimEmbeddings, artifact) in ("feeder roads", "cold chain for vaccines")
