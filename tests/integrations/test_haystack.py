"""The Haystack adapters, where haystack-ai is installed (`make interop` installs it)."""

from __future__ import annotations

import asyncio
import copy

import pytest
from support import TEXTS, run_usage

from onnxsim_embed import Embedder

pytest.importorskip("haystack", reason="haystack-ai is not installed: make interop")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from onnxsim_embed.integrations.haystack import OnnxsimDocumentEmbedder, OnnxsimTextEmbedder

# Haystack's own modules warn.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def documents():
    return [Document(content=text, id=str(row)) for row, text in enumerate(TEXTS)]


@pytest.fixture
def model(artifact):
    return Embedder(artifact, precision="fp32")


def embeddings(result):
    return [document.embedding for document in result["documents"]]


def test_documents_and_queries_get_their_own_vectors(artifact, model, documents):
    found = OnnxsimDocumentEmbedder(artifact, precision="fp32").run(documents)
    assert embeddings(found) == model.encode_document(TEXTS).tolist()
    assert [document.id for document in found["documents"]] == [d.id for d in documents]
    assert all(document.embedding is None for document in documents)
    query = OnnxsimTextEmbedder(artifact, precision="fp32").run(text=TEXTS[0])["embedding"]
    assert query == model.encode_query(TEXTS[0]).tolist()
    assert query != embeddings(found)[0]


def test_options_reach_the_model(artifact, model):
    options = {"truncate_dim": 5, "normalize_embeddings": True}
    embedder = OnnxsimDocumentEmbedder(
        artifact, precision="fp32", prompt="the ", batch_size=2, threads=1, embedding_separator=" | ",
        meta_fields_to_embed=["title", "year", "none", "absent"], **options,
    )  # fmt: skip
    document = Document(content="river", meta={"title": "water", "year": 1999, "none": None})
    others = [Document(content=None), Document(content="sun", meta=None)]
    expected = model.encode(["water | 1999 | river", "", "sun"], prompt="the ", **options)
    assert embeddings(embedder.run([document, *others])) == expected.tolist()
    query = OnnxsimTextEmbedder(artifact, precision="fp32", prompt="cat ", **options).run("x")
    assert query["embedding"] == model.encode("x", prompt="cat ", **options).tolist()


def test_async_runs_give_the_same(artifact, documents):
    document_embedder, text_embedder = (
        OnnxsimDocumentEmbedder(artifact),
        OnnxsimTextEmbedder(artifact),
    )

    async def both():
        return await asyncio.gather(
            document_embedder.run_async(documents=documents), text_embedder.run_async(text="x")
        )

    assert asyncio.run(both()) == [document_embedder.run(documents), text_embedder.run("x")]


def test_pipelines_index_and_find_and_are_stored(artifact, documents):
    store = InMemoryDocumentStore()
    indexing = Pipeline()
    indexing.add_component("embedder", OnnxsimDocumentEmbedder(str(artifact)))
    indexing.add_component("writer", DocumentWriter(store))
    indexing.connect("embedder.documents", "writer.documents")
    # Through YAML, which gives a store of its own.
    indexing = Pipeline.loads(indexing.dumps(), allowed_modules=[OnnxsimTextEmbedder.__module__])
    store = indexing.get_component("writer").document_store
    indexing.run({"embedder": {"documents": documents[:2]}})
    asking = Pipeline()
    asking.add_component("embedder", OnnxsimTextEmbedder(artifact))
    asking.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    asking.connect("embedder.embedding", "retriever.query_embedding")
    found = asking.run({"embedder": {"text": "river"}})
    assert len(found["retriever"]["documents"]) == 1


@pytest.mark.parametrize("kind", [OnnxsimDocumentEmbedder, OnnxsimTextEmbedder])
def test_components_go_through_a_dictionary(artifact, kind):
    embedder = kind(artifact, precision="int8", prompt="p ", truncate_dim=7, threads=1)
    stored = embedder.to_dict()
    assert stored["init_parameters"]["model"] == str(artifact)
    assert kind.from_dict(copy.deepcopy(stored)).to_dict() == stored
    assert set(stored["init_parameters"]) == {*kind.__init__.__kwdefaults__, "model"}


def test_both_share_one_model(artifact):
    both = OnnxsimDocumentEmbedder(artifact), OnnxsimTextEmbedder(str(artifact))
    for embedder in both:
        embedder.warm_up()
    assert both[0]._model.get() is both[1]._model.get()


def test_wrong_inputs_name_the_other_component(artifact):
    with pytest.raises(TypeError, match="got str; OnnxsimTextEmbedder takes a string"):
        OnnxsimDocumentEmbedder(artifact).run("a road")
    with pytest.raises(TypeError, match="row 1 is str"):
        OnnxsimDocumentEmbedder(artifact).run([Document(content="x"), "a road"])
    with pytest.raises(TypeError, match="got list; OnnxsimDocumentEmbedder takes"):
        OnnxsimTextEmbedder(artifact).run(["a road"])


def test_no_documents_give_none(artifact):
    assert OnnxsimDocumentEmbedder(artifact).run([]) == {"documents": []}


@pytest.mark.parametrize("kind", [OnnxsimDocumentEmbedder, OnnxsimTextEmbedder])
def test_their_usage_runs(artifact, kind):
    assert run_usage(kind, artifact) == "32"
