"""LlamaIndex: a BaseEmbedding on this package's models."""

from __future__ import annotations

import asyncio
from typing import Any

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations.loading import LazyModel, ModelSettings

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.llama_index", "llama-index", "llama-index-core"
    ) from None


class OnnxsimEmbedding(BaseEmbedding):
    """LlamaIndex embeddings: texts by `encode_document`, queries by `encode_query`.

    The model is loaded at its first use. The async methods run in a thread, so that the event loop
    does not wait. It goes through `to_dict` and `from_dict`, and pickles, as its settings.

    :param model_name: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: "auto", "fp32" or "int8".
    :param device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
    :param threads: batches run at the same time; None for the processors this process may use.
    :param batch_size: at most so many texts in one call of the model; None (recommended): as many as
        fill the processor's cache.
    :param query_prompt: text put before each query; None for the model's own "query" prompt.
    :param document_prompt: text put before each text; None for the model's own.
    :param normalize_embeddings: True scales vectors to L2 norm 1; None leaves them as the model does.
    :param truncate_dim: keep only the first so many components.
    :param embed_batch_size: nodes that LlamaIndex hands over at once, at most 2048.
    :raises MissingExtraError: at import, if llama-index-core is not installed.

    Usage::

        from llama_index.core import Document, VectorStoreIndex
        from onnxsim_embed.integrations.llama_index import OnnxsimEmbedding

        documents = [Document(text="feeder roads"), Document(text="cold chain for vaccines")]
        model = OnnxsimEmbedding(model_name="all-MiniLM-L6-v2")
        index = VectorStoreIndex.from_documents(documents, embed_model=model)
        found = index.as_retriever(similarity_top_k=1).retrieve("immunisation")
        print(found[0].text)
    """

    model_config = ConfigDict(extra="forbid")  # an argument that is not known is an error

    model_name: str = Field(description="Recipe name, artifact or checkpoint directory, or Hub id.")
    precision: str = Field(default="auto", description="auto, fp32 or int8.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N or openvino.")
    threads: int | None = Field(default=None, description="Batches run at the same time.")
    batch_size: int | None = Field(default=None, description="Texts in one call of the model.")
    query_prompt: str | None = Field(default=None, description="Put before each query.")
    document_prompt: str | None = Field(default=None, description="Put before each text.")
    normalize_embeddings: bool | None = Field(default=None, description="Scale to L2 norm 1.")
    truncate_dim: int | None = Field(default=None, description="Components kept.")
    # LlamaIndex's own default of 10 leaves hardly any texts of equal length to run together.
    embed_batch_size: int = Field(
        default=1024, gt=0, le=2048, description="Nodes handed over at once."
    )
    _model: LazyModel = PrivateAttr()

    def model_post_init(self, context: Any) -> None:  # noqa: ANN401 - pydantic's signature
        """Make the model ready to be loaded."""
        super().model_post_init(context)
        self._model = LazyModel(
            ModelSettings(self.model_name, self.precision, self.device, self.threads)
        )

    @classmethod
    def class_name(cls) -> str:
        """Return the name by which LlamaIndex stores this class."""
        return "OnnxsimEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors = self._model.get().encode_document(
            texts,
            prompt=self.document_prompt,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )
        return vectors.tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        vector = self._model.get().encode_query(
            query,
            prompt=self.query_prompt,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )
        return vector.tolist()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)
