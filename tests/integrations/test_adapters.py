"""The LangChain, LlamaIndex, Haystack and Chroma adapters, where their libraries are installed (`make interop`)."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle

import numpy as np
import pytest
from support import TEXTS, run_usage

from onnxsim_embed import Embedder
from onnxsim_embed.errors import CheckpointError

# LlamaIndex's and Haystack's own modules warn.
pytestmark = pytest.mark.filterwarnings("default")

OPTIONS = {"truncate_dim": 5, "normalize_embeddings": True, "long_texts": "mean"}


class LangChain:
    """What the tests call of an adapter."""

    library = "langchain_core"

    def __init__(self, model, **options):
        from onnxsim_embed.integrations.langchain import OnnxsimEmbeddings

        self.classes = [OnnxsimEmbeddings]
        self.adapter = OnnxsimEmbeddings(model, **options)

    def documents(self, texts):
        return self.adapter.embed_documents(texts)

    def query(self, text):
        return self.adapter.embed_query(text)

    async def both(self):
        return await asyncio.gather(
            self.adapter.aembed_documents(TEXTS), self.adapter.aembed_query("a road")
        )

    def copies(self):
        return [pickle.loads(pickle.dumps(self.adapter)), copy.deepcopy(self.adapter)]


class LlamaIndex(LangChain):
    library = "llama_index.core"

    def __init__(self, model, **options):
        from onnxsim_embed.integrations.llama_index import OnnxsimEmbedding

        self.classes = [OnnxsimEmbedding]
        self.adapter = OnnxsimEmbedding(model_name=str(model), **options)

    def documents(self, texts):
        return self.adapter.get_text_embedding_batch(texts)

    def query(self, text):
        return self.adapter.get_query_embedding(text)

    async def both(self):
        return await asyncio.gather(
            self.adapter.aget_text_embedding_batch(TEXTS),
            self.adapter.aget_query_embedding("a road"),
        )

    def copies(self):
        return [*super().copies(), self.classes[0].from_dict(self.adapter.to_dict())]


class Haystack(LangChain):
    library = "haystack"

    def __init__(self, model, query_prompt=None, document_prompt=None, batch_size=None, **options):
        from haystack import Document

        from onnxsim_embed.integrations.haystack import OnnxsimDocumentEmbedder, OnnxsimTextEmbedder

        self.document = Document
        self.classes = [OnnxsimDocumentEmbedder, OnnxsimTextEmbedder]
        documents = {"prompt": document_prompt, "batch_size": batch_size, **options}
        self.adapter = (
            OnnxsimDocumentEmbedder(model, **documents),
            OnnxsimTextEmbedder(model, prompt=query_prompt, **options),
        )

    def documents(self, texts):
        result = self.adapter[0].run([self.document(content=text) for text in texts])
        return [document.embedding for document in result["documents"]]

    def query(self, text):
        return self.adapter[1].run(text)["embedding"]

    async def both(self):
        documents, text = await asyncio.gather(
            self.adapter[0].run_async([self.document(content=text) for text in TEXTS]),
            self.adapter[1].run_async("a road"),
        )
        return [[d.embedding for d in documents["documents"]], text["embedding"]]

    def copies(self):
        pairs = zip(self.classes, self.adapter, strict=True)
        return [tuple(kind.from_dict(component.to_dict()) for kind, component in pairs)]


class Chroma(LangChain):
    library = "chromadb"

    def __init__(self, model, batch_size=None, **options):
        from onnxsim_embed.integrations.chroma import OnnxsimEmbeddingFunction

        self.classes = [OnnxsimEmbeddingFunction]
        self.adapter = OnnxsimEmbeddingFunction(model, **options)

    def documents(self, texts):  # Chroma itself rejects an empty list
        return texts and [vector.tolist() for vector in self.adapter(texts)]

    def query(self, text):
        return self.adapter.embed_query([text])[0].tolist()

    async def both(self):
        return [self.documents(TEXTS), self.query("a road")]

    def copies(self):
        return [self.adapter.build_from_config(json.loads(json.dumps(self.adapter.get_config())))]


@pytest.fixture(params=[LangChain, LlamaIndex, Haystack, Chroma])
def kind(request):
    pytest.importorskip(request.param.library, reason="the library is not installed: make interop")
    return request.param


@pytest.fixture
def adapter(kind, artifact):
    return kind(artifact, precision="fp32")


@pytest.fixture
def model(artifact):
    return Embedder(artifact, precision="fp32")


def test_documents_and_queries_have_their_own_prompts(adapter, model):
    assert adapter.documents(TEXTS) == model.encode_document(TEXTS).tolist()
    assert adapter.query(TEXTS[0]) == model.encode_query(TEXTS[0]).tolist()
    assert adapter.query(TEXTS[0]) != adapter.documents(TEXTS[:1])[0]
    assert type(adapter.query("a road")[0]) is type(adapter.documents(["a road"])[0][0]) is float
    assert adapter.documents([]) == []


def test_async_methods_return_the_same(adapter):
    assert asyncio.run(adapter.both()) == [adapter.documents(TEXTS), adapter.query("a road")]


def test_options_reach_the_model(kind, artifact, model):
    prompts = {"query_prompt": "cat ", "document_prompt": "the "}
    adapter = kind(artifact, precision="fp32", batch_size=2, threads=1, **prompts, **OPTIONS)
    assert adapter.query("x") == model.encode("x", prompt="cat ", **OPTIONS).tolist()
    assert adapter.documents(TEXTS) == model.encode(TEXTS, prompt="the ", **OPTIONS).tolist()


def test_copies_carry_only_the_settings(adapter):
    expected = adapter.query("x"), adapter.documents(["x"])
    for again in adapter.copies():
        adapter.adapter = again
        assert (adapter.query("x"), adapter.documents(["x"])) == expected
    assert len(pickle.dumps(adapter.copies()[0])) < 3000


def test_the_model_is_loaded_on_first_use(kind, tmp_path):
    adapter = kind(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        adapter.query("x")


def test_an_unknown_option_is_an_error(kind, artifact):
    with pytest.raises((TypeError, ValueError), match="batchsize"):
        kind(artifact, batchsize=3)


def test_the_usage_runs(adapter, artifact):
    for documented in adapter.classes:
        assert run_usage(documented, artifact) in ("32", "feeder roads", "cold chain for vaccines")


# Each library's own


def test_langchain_takes_lists_of_documents_and_one_query(artifact):
    pytest.importorskip("langchain_core")
    adapter = LangChain(artifact)
    for documents in (["a", None], "a text", {"a": 1}, {"a"}, b"a", np.array([["a"]])):
        with pytest.raises(TypeError):
            adapter.documents(documents)
    for query in (["a", "b"], None, b"a"):
        with pytest.raises(TypeError, match="string"):
            adapter.query(query)


def test_langchain_takes_a_loaded_model(model):
    pytest.importorskip("langchain_core")
    from langchain_core.embeddings import Embeddings

    adapter = LangChain(model)
    assert isinstance(adapter.adapter, Embeddings)
    for again in (adapter.adapter, *adapter.copies()):
        assert again.embed_query("x") == model.encode_query("x").tolist()


def test_llama_index_needs_a_name_and_embeds_single_texts(artifact, model):
    pytest.importorskip("llama_index.core")
    adapter = LlamaIndex(artifact, precision="fp32").adapter
    assert adapter.get_text_embedding("a road") == model.encode_document("a road").tolist()
    assert adapter.to_dict()["class_name"] == "OnnxsimEmbedding"
    with pytest.raises(ValueError, match="model_name"):
        type(adapter)()


@pytest.fixture
def haystack(artifact):
    pytest.importorskip("haystack")
    return Haystack(artifact, precision="fp32")


def test_haystack_prepends_meta_fields(haystack, artifact, model):
    embedder = haystack.classes[0](
        artifact, precision="fp32", embedding_separator=" | ",
        meta_fields_to_embed=["title", "year", "none", "absent"],
    )  # fmt: skip
    documents = [
        haystack.document(content="river", meta={"title": "water", "year": 1999, "none": None}),
        haystack.document(content=None),
        haystack.document(content="sun", meta=None),
    ]
    result = embedder.run(documents)["documents"]
    expected = model.encode(["water | 1999 | river", "", "sun"]).tolist()
    assert [document.embedding for document in result] == expected
    assert [document.id for document in result] == [document.id for document in documents]
    assert all(document.embedding is None for document in documents)


def test_haystack_stores_pipelines(haystack):
    from haystack import Pipeline

    pipeline = Pipeline()
    pipeline.add_component("embedder", haystack.adapter[1])
    stored = pipeline.dumps()
    loaded = Pipeline.loads(stored, allowed_modules=[haystack.classes[1].__module__])
    assert loaded.dumps() == stored
    result = loaded.run({"embedder": {"text": "river"}})
    assert result["embedder"]["embedding"] == haystack.query("river")


def test_haystack_components_share_one_model(haystack):
    documents, text = haystack.adapter
    documents.warm_up()
    text.warm_up()
    assert documents._load() is text._load()


def test_haystack_names_the_other_component(haystack):
    documents, text = haystack.adapter
    for run, wrong, message in (
        (documents.run, "a road", "OnnxsimTextEmbedder"),
        (documents.run, [haystack.document(content="x"), "a road"], "row 1 is str"),
        (text.run, ["a road"], "OnnxsimDocumentEmbedder"),
    ):
        with pytest.raises(TypeError, match=message):
            run(wrong)


@pytest.fixture
def collection(artifact, tmp_path):
    """A collection on disk with its function, and a function that opens it again."""
    chromadb = pytest.importorskip("chromadb")
    chroma = Chroma(artifact, precision="fp32", threads=1)
    collection = chromadb.PersistentClient(str(tmp_path)).create_collection(
        "texts", embedding_function=chroma.adapter
    )
    collection.add(ids=list(map(str, range(len(TEXTS)))), documents=TEXTS)
    return chroma, collection, chromadb.PersistentClient(str(tmp_path)).get_collection


def test_a_chroma_collection_builds_its_function_again(collection, model):
    chroma, made, reopen = collection
    again = reopen("texts")  # without a function: that of its configuration
    found = again.query(query_texts=["a road"], include=["distances"])
    assert found == made.query(query_texts=["a road"], include=["distances"])
    stored = again.get(include=["embeddings"], ids=["0"])["embeddings"][0]
    # Chroma scales vectors to length 1 once more.
    np.testing.assert_allclose(stored, model.encode_document(TEXTS[0]), atol=1e-6)
    built = again.configuration["embedding_function"]
    assert type(built) is chroma.classes[0]
    assert built.get_config() == chroma.adapter.get_config()
    assert again.configuration["hnsw"]["space"] == "cosine"
    expected = 1 - model.encode_document(TEXTS) @ model.encode_query("a road")
    np.testing.assert_allclose(found["distances"][0], np.sort(expected)[:10], atol=1e-5)


def test_a_chroma_collection_keeps_what_its_vectors_depend_on(collection, artifact):
    chroma, made, reopen = collection
    made.modify(configuration={"embedding_function": chroma.classes[0](artifact, threads=2)})
    config = reopen("texts").configuration["embedding_function"].get_config()
    assert (config["threads"], config["precision"]) == (2, "auto")
    other = {"embedding_function": chroma.classes[0](artifact, truncate_dim=5)}
    with pytest.raises(ValueError, match="truncate_dim=None, not 5"):
        made.modify(configuration=other)


def test_a_relative_path_is_kept_whole_by_chroma(artifact, monkeypatch):
    pytest.importorskip("chromadb")
    monkeypatch.chdir(artifact.parent)
    assert Chroma(artifact.name).adapter.get_config()["model"] == str(artifact.resolve())
