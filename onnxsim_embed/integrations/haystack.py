"""Haystack: a document embedder and a text embedder on this package's models.

Haystack loads stored pipelines only with components of trusted modules:
`Pipeline.loads(text, allowed_modules=["onnxsim_embed.integrations.haystack"])`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations.loading import (
    LazyModel,
    ModelSettings,
    embed_documents,
    embed_query,
)

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.haystack", "haystack", "haystack-ai"
    ) from None

if TYPE_CHECKING:
    from typing_extensions import Self


class _Embedder:
    """Loading and serialization of both components."""

    def _set_model(
        self, model: str | Path, precision: str, device: str, threads: int | None
    ) -> None:
        self.settings = ModelSettings(str(model), precision, device, threads)
        self._model = LazyModel(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack stores it."""
        attributes = vars(self.settings) | vars(self) | {"model": self.settings.name}
        parameters = set(signature(type(self).__init__).parameters)
        stored: dict[str, Any] = default_to_dict(
            self, **{name: value for name, value in attributes.items() if name in parameters}
        )
        return stored

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Create the component from the result of `to_dict`."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model."""
        self._model.get()


@component
class OnnxsimDocumentEmbedder(_Embedder):
    """Haystack component that sets the embeddings of documents, by `encode_document`.

    The model is loaded by `warm_up`, which a pipeline calls, or on the first run. Components with the
    same model, precision, device and threads share one model in memory.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param prompt: string prepended to each document; None for the model's own.
    :param normalize_embeddings: True scales embeddings to unit L2 norm; None leaves them as they are.
    :param truncate_dim: truncate embeddings to this dimension.
    :param long_texts: "truncate" texts beyond the model's length, or "mean" of windows; see `Embedder.encode`.
    :param progress_bar: whether to show a progress bar.
    :param meta_fields_to_embed: fields of a document's meta that are prepended to its content.
    :param embedding_separator: separator of those fields and the content.
    :raises MissingExtraError: at import, if haystack-ai is not installed.

    Usage::

        from haystack import Document
        from onnxsim_embed.integrations.haystack import OnnxsimDocumentEmbedder

        embedder = OnnxsimDocumentEmbedder("all-MiniLM-L6-v2", meta_fields_to_embed=["title"])
        documents = [Document(content="Gravel, 12 km", meta={"title": "Feeder roads"})]
        print(len(embedder.run(documents)["documents"][0].embedding))
    """

    def __init__(
        self,
        model: str | Path = "all-MiniLM-L6-v2",
        *,
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        long_texts: str = "truncate",
        progress_bar: bool = False,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        self._set_model(model, precision, device, threads)
        self.batch_size = batch_size
        self.prompt = prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self.long_texts = long_texts
        self.progress_bar = progress_bar
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator

    @property
    def show_progress_bar(self) -> bool:
        """Name of `progress_bar` in `Embedder.encode`."""
        return self.progress_bar

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Return documents with their embeddings.

        :param documents: the documents; they stay unchanged.
        :returns: "documents": copies with `embedding`, a list of `dim` numbers.
        :raises TypeError: if this is not a list of Documents, naming the row.
        """
        if not isinstance(documents, list):
            raise TypeError(
                f"OnnxsimDocumentEmbedder takes a list of Documents, got {type(documents).__name__}; "
                "OnnxsimTextEmbedder takes a string"
            )
        for row, document in enumerate(documents):
            if not isinstance(document, Document):
                raise TypeError(
                    f"OnnxsimDocumentEmbedder takes Documents, row {row} is {type(document).__name__}"
                )
        texts = [self._text(document) for document in documents]
        pairs = zip(documents, embed_documents(self, texts, self.prompt), strict=True)
        return {"documents": [replace(document, embedding=vector) for document, vector in pairs]}

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Return documents with their embeddings, as `run` does, in a thread."""
        return await asyncio.to_thread(self.run, documents)

    def _text(self, document: Document) -> str:
        """Return the text of a document: its values of the meta fields, and its content."""
        meta = document.meta or {}
        values = (meta.get(field) for field in self.meta_fields_to_embed)
        fields = [str(value) for value in values if value is not None]
        return self.embedding_separator.join([*fields, document.content or ""])


@component
class OnnxsimTextEmbedder(_Embedder):
    """Haystack component that returns the embedding of a query, by `encode_query`.

    :param model: as for OnnxsimDocumentEmbedder, as are the others.
    :param prompt: string prepended to the query; None for the model's "query" prompt.
    :raises MissingExtraError: at import, if haystack-ai is not installed.

    Usage::

        from onnxsim_embed.integrations.haystack import OnnxsimTextEmbedder

        embedder = OnnxsimTextEmbedder("all-MiniLM-L6-v2")
        print(len(embedder.run("immunisation logistics")["embedding"]))
    """

    def __init__(
        self,
        model: str | Path = "all-MiniLM-L6-v2",
        *,
        precision: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        long_texts: str = "truncate",
    ) -> None:
        self._set_model(model, precision, device, threads)
        self.prompt = prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self.long_texts = long_texts

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """Return the embedding of a query.

        :param text: the query.
        :returns: "embedding": a list of `dim` numbers.
        :raises TypeError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"OnnxsimTextEmbedder takes a string, got {type(text).__name__}; "
                "OnnxsimDocumentEmbedder takes a list of Documents"
            )
        return {"embedding": embed_query(self, text, self.prompt)}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, list[float]]:
        """Return the embedding of a query, as `run` does, in a thread."""
        return await asyncio.to_thread(self.run, text)
