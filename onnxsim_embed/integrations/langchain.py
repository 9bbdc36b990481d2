"""LangChain: an Embeddings on this package's models."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsim_embed.errors import needs_extra
from onnxsim_embed.integrations.loading import ModelOptions, embed_documents, embed_query

with needs_extra("onnxsim_embed.integrations.langchain", "langchain", "langchain-core"):
    from langchain_core.embeddings import Embeddings


@dataclass(eq=False, kw_only=True)
class OnnxsimEmbeddings(ModelOptions, Embeddings):
    """LangChain embeddings: documents by `encode_document`, queries by `encode_query`.

    The model is loaded on first use. LangChain runs `aembed_documents` and `aembed_query` in a thread.

    :param model: recipe name, artifact directory, checkpoint directory, Hub id, or an Embedder.
    :param precision: as for `Embedder`, as are `device` and `threads`; an Embedder keeps its own.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param query_prompt: string prepended to each query; None for the model's "query" prompt.
    :param document_prompt: string prepended to each document; None for the model's own.
    :param normalize_embeddings: as for `Embedder.encode`, as are `truncate_dim` and `long_texts`.
    :param show_progress_bar: whether `embed_documents` shows a progress bar.
    :raises MissingExtraError: at import, if langchain-core is not installed.

    Usage::

        from langchain_core.vectorstores import InMemoryVectorStore
        from onnxsim_embed.integrations.langchain import OnnxsimEmbeddings

        store = InMemoryVectorStore(OnnxsimEmbeddings("all-MiniLM-L6-v2"))
        store.add_texts(["feeder roads", "cold chain for vaccines"])
        print(store.similarity_search("immunisation", k=1)[0].page_content)
    """

    batch_size: int | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    show_progress_bar: bool = False

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the embeddings of documents.

        :param texts: n documents.
        :returns: n lists of `dim` numbers.
        :raises TypeError: if this is not a list of strings, naming the row.
        """
        return embed_documents(self, texts, self.document_prompt)

    def embed_query(self, text: str) -> list[float]:
        """Return the embedding of a query.

        :param text: the query.
        :returns: `dim` numbers.
        """
        return embed_query(self, text, self.query_prompt)
