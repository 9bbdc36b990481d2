"""LlamaIndex: a BaseEmbedding on this package's models."""

from __future__ import annotations

import asyncio

from onnxsim_embed.errors import needs_extra
from onnxsim_embed.integrations.loading import (
    LazyModel,
    embed_documents,
    embed_query,
    load_model,
)
from onnxsim_embed.runtime.embedder import Embedder

with needs_extra("onnxsim_embed.integrations.llama_index", "llama-index", "llama-index-core"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr


class OnnxsimEmbedding(BaseEmbedding):
    """LlamaIndex embeddings: texts by `encode_document`, queries by `encode_query`.

    The model is loaded on first use. The async methods run in a thread. `to_dict`, `from_dict` and
    pickles carry only the settings.

    :param model_name: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param query_prompt: string prepended to each query; None for the model's "query" prompt.
    :param document_prompt: string prepended to each text; None for the model's own.
    :param normalize_embeddings: as for `Embedder.encode`, as are `truncate_dim` and `long_texts`.
    :param embed_batch_size: number of nodes that LlamaIndex passes per call, at most 2048.
    :raises MissingExtraError: at import, if llama-index-core is not installed.

    Usage::

        from llama_index.core import Document, VectorStoreIndex
        from onnxsim_embed.integrations.llama_index import OnnxsimEmbedding

        documents = [Document(text="feeder roads"), Document(text="cold chain for vaccines")]
        model = OnnxsimEmbedding(model_name="all-MiniLM-L6-v2")
        index = VectorStoreIndex.from_documents(documents, embed_model=model)
        results = index.as_retriever(similarity_top_k=1).retrieve("immunisation")
        print(results[0].text)
    """

    model_config = ConfigDict(extra="forbid")  # an unknown argument is an error

    model_name: str = Field(description="Recipe name, artifact or checkpoint directory, or Hub id.")
    precision: str = Field(default="auto", description="auto, fp32 or int8.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(default=None, description="Batches run concurrently.")
    batch_size: int | None = Field(default=None, description="Texts in one call of the model.")
    query_prompt: str | None = Field(default=None, description="Prepended to each query.")
    document_prompt: str | None = Field(default=None, description="Prepended to each text.")
    normalize_embeddings: bool | None = Field(default=None, description="Scale to L2 norm 1.")
    truncate_dim: int | None = Field(default=None, description="Dimension of truncated embeddings.")
    long_texts: str = Field(default="truncate", description="truncate or mean.")
    # LlamaIndex's own default of 10 leaves hardly any texts of equal length for one batch.
    embed_batch_size: int = Field(default=1024, gt=0, le=2048, description="Nodes per call.")
    _model: LazyModel | None = PrivateAttr(None)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex stores this class."""
        return "OnnxsimEmbedding"

    def _load(self) -> Embedder:
        return load_model(self, self.model_name)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return embed_documents(self, texts, self.document_prompt)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return embed_query(self, query, self.query_prompt)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)
