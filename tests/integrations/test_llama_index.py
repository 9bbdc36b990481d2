"""The LlamaIndex adapter, where llama-index-core is installed (`make interop` installs it)."""

from __future__ import annotations

import asyncio
import copy
import pickle

import pytest
from support import TEXTS, run_usage

from onnxsim_embed import Embedder

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed: make interop")

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import ValidationError

from onnxsim_embed.integrations.llama_index import OnnxsimEmbedding

# LlamaIndex's own modules warn.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def embedding(artifact):
    return OnnxsimEmbedding(model_name=str(artifact), precision="fp32")


@pytest.fixture
def model(artifact):
    return Embedder(artifact, precision="fp32")


def test_texts_and_queries_get_their_own_vectors(embedding, model):
    assert isinstance(embedding, BaseEmbedding)
    assert embedding.get_text_embedding_batch(TEXTS) == model.encode_document(TEXTS).tolist()
    assert embedding.get_text_embedding(TEXTS[0]) == model.encode_document(TEXTS[0]).tolist()
    assert embedding.get_query_embedding(TEXTS[0]) == model.encode_query(TEXTS[0]).tolist()
    assert embedding.get_query_embedding(TEXTS[0]) != embedding.get_text_embedding(TEXTS[0])


def test_async_methods_give_the_same(embedding):
    async def all_three():
        return await asyncio.gather(
            embedding.aget_text_embedding_batch(TEXTS),
            embedding.aget_text_embedding("a road"),
            embedding.aget_query_embedding("a road"),
        )

    assert asyncio.run(all_three()) == [
        embedding.get_text_embedding_batch(TEXTS),
        embedding.get_text_embedding("a road"),
        embedding.get_query_embedding("a road"),
    ]


def test_options_reach_the_model(artifact, model):
    embedding = OnnxsimEmbedding(
        model_name=str(artifact), precision="fp32", query_prompt="cat ", document_prompt="the ",
        truncate_dim=5, normalize_embeddings=True, batch_size=2, threads=1, embed_batch_size=3,
    )  # fmt: skip
    options = {"truncate_dim": 5, "normalize_embeddings": True}
    query = model.encode("x", prompt="cat ", **options)
    assert embedding.get_query_embedding("x") == query.tolist()
    texts = model.encode(TEXTS, prompt="the ", **options)
    assert embedding.get_text_embedding_batch(TEXTS) == texts.tolist()


def test_an_index_finds_with_it(embedding):
    documents = [Document(text="solar energy"), Document(text="the water of the river")]
    index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
    assert len(index.as_retriever(similarity_top_k=1).retrieve("river")) == 1


def test_it_goes_through_a_dictionary(embedding):
    stored = embedding.to_dict()
    assert stored["class_name"] == "OnnxsimEmbedding"
    assert stored["precision"] == "fp32"
    again = OnnxsimEmbedding.from_dict(stored)
    assert again.get_query_embedding("x") == embedding.get_query_embedding("x")
    assert again.to_dict() == stored


def test_it_pickles_and_copies_as_its_settings(embedding):
    expected = embedding.get_query_embedding("x")
    content = pickle.dumps(embedding)
    assert pickle.loads(content).get_query_embedding("x") == expected
    assert copy.deepcopy(embedding).get_query_embedding("x") == expected


def test_the_model_is_loaded_at_first_use(tmp_path):
    embedding = OnnxsimEmbedding(model_name=str(tmp_path / "nothing"))
    with pytest.raises(Exception, match="nothing"):
        embedding.get_query_embedding("x")


def test_a_name_is_needed_and_unknown_options_are_refused(artifact):
    with pytest.raises(ValidationError, match="model_name"):
        OnnxsimEmbedding()
    with pytest.raises(ValidationError, match="batchsize"):
        OnnxsimEmbedding(model_name=str(artifact), batchsize=3)


def test_its_usage_runs(artifact):
    assert run_usage(OnnxsimEmbedding, artifact) in ("feeder roads", "cold chain for vaccines")
