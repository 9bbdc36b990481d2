"""LangChain: an Embeddings on this package's models."""

from __future__ import annotations

from pathlib import Path

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations.loading import LazyModel, ModelSettings
from onnxsim_embed.runtime.embedder import Embedder

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.langchain", "langchain", "langchain-core"
    ) from None


class OnnxsimEmbeddings(Embeddings):
    """LangChain embeddings: documents by `encode_document`, queries by `encode_query`.

    The model is loaded at its first use. `aembed_documents` and `aembed_query` run in a thread of
    LangChain's, so that the event loop does not wait.

    :param model: recipe name, artifact directory, checkpoint directory, Hub id, or an Embedder.
    :param precision: "auto", "fp32" or "int8"; with an Embedder its own counts.
    :param device: "auto", "cpu", "cuda", "cuda:N" or "openvino"; with an Embedder its own counts.
    :param threads: batches run at the same time; None for the processors this process may use; with
        an Embedder its own counts.
    :param batch_size: at most so many texts in one call of the model; None (recommended): as many as
        fill the processor's cache.
    :param query_prompt: text put before each query; None for the model's own "query" prompt.
    :param document_prompt: text put before each document; None for the model's own.
    :param normalize_embeddings: True scales vectors to L2 norm 1; None leaves them as the model does.
    :param truncate_dim: keep only the first so many components.
    :param show_progress_bar: show how far `embed_documents` is.
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
        self.show_progress_bar = show_progress_bar

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of documents.

        :param texts: n documents.
        :returns: n lists of `dim` numbers.
        :raises TypeError: naming the row that is not a string.
        """
        vectors = self._model.get().encode_document(
            texts,
            prompt=self.document_prompt,
            batch_size=self.batch_size,
            show_progress_bar=self.show_progress_bar,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )
        return vectors.tolist()

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a query.

        :param text: the query.
        :returns: `dim` numbers.
        """
        vector = self._model.get().encode_query(
            text,
            prompt=self.query_prompt,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )
        return vector.tolist()
