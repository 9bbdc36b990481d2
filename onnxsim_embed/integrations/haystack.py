"""Haystack: a document embedder and a text embedder on this package's models.

Haystack loads stored pipelines only with components of trusted modules:
`Pipeline.loads(text, allowed_modules=["onnxsim_embed.integrations.haystack"])`.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsim_embed.errors import needs_extra
from onnxsim_embed.integrations.loading import ModelOptions, embed_documents, embed_query

with needs_extra("onnxsim_embed.integrations.haystack", "haystack", "haystack-ai"):
    from haystack import Document, component, default_from_dict, default_to_dict

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(eq=False, repr=False, kw_only=True)
class _Embedder(ModelOptions):
    """Arguments, loading and serialization of both components."""

    model: str | Path = field(default="all-MiniLM-L6-v2", kw_only=False)
    prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack stores it."""
        stored: dict[str, Any] = default_to_dict(self, **asdict(self) | {"model": str(self.model)})
        return stored

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Create the component from the result of `to_dict`."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model."""
        self._load()


@component
@dataclass(eq=False, repr=False, kw_only=True)
class OnnxsimDocumentEmbedder(_Embedder):
    """Haystack component that sets the embeddings of documents, by `encode_document`.

    The model is loaded by `warm_up`, which a pipeline calls, or on the first run. Components with the
    same model, precision, device and threads share one model in memory.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param batch_size: maximum number of texts per model call; None (recommended) fits the caches.
    :param prompt: string prepended to each document; None for the model's own.
    :param normalize_embeddings: as for `Embedder.encode`, as are `truncate_dim` and `long_texts`.
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

    batch_size: int | None = None
    progress_bar: bool = False
    meta_fields_to_embed: list[str] | None = field(default_factory=list)
    embedding_separator: str = "\n"

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
        values = (meta.get(field) for field in self.meta_fields_to_embed or ())
        fields = [str(value) for value in values if value is not None]
        return self.embedding_separator.join([*fields, document.content or ""])


@component
@dataclass(eq=False, repr=False, kw_only=True)
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
