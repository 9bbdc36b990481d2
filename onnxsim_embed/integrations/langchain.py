"""LangChain: an Embeddings on this package's models."""

from __future__ import annotations

from pathlib import Path

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations.loading import (
    LazyModel,
    ModelSettings,
    embed_documents,
    embed_query,
)
from onnxsim_embed.runtime.embedder import Embedder

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.langchain", "langchain", "langchain-core"
    ) from None


class OnnxsimEmbeddings(Embeddings):
    """LangChain embeddings: documents by `encode_document`, queries by `encode_query`.

    The model is loaded on first use. LangChain runs `aembed_documents` and `aembed_query` in a thread.

    :param model: recipe name, artifact directory, checkpoint directory, Hub id, or an Embedder.
    :param precision: as for `Embedder`, as are `device` and `threads`; an Embedder keeps its own.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param query_prompt: string prepended to each query; None for the model's "query" prompt.
    :param document_prompt: string prepended to each document; None for the model's own.
    :param normalize_embeddings: True scales embeddings to unit L2 norm; None leaves them as they are.
    :param truncate_dim: truncate embeddings to this dimension.
    :param long_texts: "truncate" texts beyond the model's length, or "mean" of windows; see `Embedder.encode`.
    :param show_progress_bar: whether `embed_documents` shows a progress bar.
    :raises MissingExtraError: at import, if langchain-core is not installed.

    Usage::

        from langchain_core.vectorstores import InMemoryVectorStore
        from onnxsim_embed.integrations.langchain import OnnxsimEmbeddings

        store = InMemoryVectorStore(OnnxsimEmbeddings("all-MiniLM-L6-v2"))
        store.add_texts(["feeder roads", "cold chain for vaccines"])
        print(store.similarity_search("immunisation", k=1)[0].page_content)
    """

    def __init__(
        self,
        model: str | Path | Embedder,
        *,
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        long_texts: str = "truncate",
        show_progress_bar: bool = False,
    ) -> None:
        if isinstance(model, Embedder):
            self._model = LazyModel(model)
        else:
            self._model = LazyModel(ModelSettings(str(model), precision, device, threads))
        self.batch_size = batch_size
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self.long_texts = long_texts
        self.show_progress_bar = show_progress_bar

    def __repr__(self) -> str:
        return f"OnnxsimEmbeddings({self._model.settings or self._model.get()!r})"

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
