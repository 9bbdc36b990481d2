"""Haystack: a document embedder and a text embedder on this package's models.

Haystack loads stored pipelines with components of modules that it was told to trust:
`Pipeline.loads(text, allowed_modules=["onnxsim_embed.integrations.haystack"])`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxsim_embed.errors import MissingExtraError
from onnxsim_embed.integrations.loading import LazyModel, ModelSettings

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ModuleNotFoundError:
    raise MissingExtraError(
        "onnxsim_embed.integrations.haystack", "haystack", "haystack-ai"
    ) from None


@component
class OnnxsimDocumentEmbedder:
    """Haystack component that gives documents their embeddings, by `encode_document`.

    The model is loaded by `warm_up`, which a pipeline calls, or at the first run. Components with the
    same model, precision, device and threads share one in memory.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: "auto", "fp32" or "int8".
    :param device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
    :param threads: batches run at the same time; None for the processors this process may use.
    :param batch_size: at most so many texts in one call of the model; None (recommended): as many as
        fill the processor's cache.
    :param prompt: text put before each document; None for the model's own.
    :param normalize_embeddings: True scales vectors to L2 norm 1; None leaves them as the model does.
    :param truncate_dim: keep only the first so many components.
    :param progress_bar: show how far a run is.
    :param meta_fields_to_embed: fields of a document's meta put before its content.
    :param embedding_separator: stands between those fields and the content.
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
        progress_bar: bool = False,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        self.settings = ModelSettings(str(model), precision, device, threads)
        self.batch_size = batch_size
        self.prompt = prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self.progress_bar = progress_bar
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self._model = LazyModel(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack stores it."""
        return default_to_dict(
            self,
            **_model_parameters(self.settings),
            batch_size=self.batch_size,
            prompt=self.prompt,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
            progress_bar=self.progress_bar,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OnnxsimDocumentEmbedder:
        """Make the component from what `to_dict` returned."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model."""
        self._model.get()

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Give documents their embeddings.

        :param documents: the documents; they stay as they are.
        :returns: "documents": copies with `embedding`, a list of `dim` numbers.
        :raises TypeError: naming what is no Document.
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
        vectors = self._model.get().encode_document(
            [self._text(document) for document in documents],
            prompt=self.prompt,
            batch_size=self.batch_size,
            show_progress_bar=self.progress_bar,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )
        pairs = zip(documents, vectors.tolist(), strict=True)
        return {"documents": [replace(document, embedding=vector) for document, vector in pairs]}

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Give documents their embeddings, as `run` does, in a thread: the event loop does not wait."""
        return await asyncio.to_thread(self.run, documents)

    def _text(self, document: Document) -> str:
        """Return what is embedded of a document: meta fields that it has, and its content."""
        found = (document.meta.get(field) for field in self.meta_fields_to_embed)
        fields = [str(value) for value in found if value is not None]
        return self.embedding_separator.join([*fields, document.content or ""])


@component
class OnnxsimTextEmbedder:
    """Haystack component that turns a query into a vector, by `encode_query`.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: "auto", "fp32" or "int8".
    :param device: "auto", "cpu", "cuda", "cuda:N" or "openvino".
    :param threads: batches run at the same time; None for the processors this process may use.
    :param prompt: text put before the query; None for the model's own "query" prompt.
    :param normalize_embeddings: True scales vectors to L2 norm 1; None leaves them as the model does.
    :param truncate_dim: keep only the first so many components.
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
    ) -> None:
        self.settings = ModelSettings(str(model), precision, device, threads)
        self.prompt = prompt
        self.normalize_embeddings = normalize_embeddings
        self.truncate_dim = truncate_dim
        self._model = LazyModel(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack stores it."""
        return default_to_dict(
            self,
            **_model_parameters(self.settings),
            prompt=self.prompt,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OnnxsimTextEmbedder:
        """Make the component from what `to_dict` returned."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model."""
        self._model.get()

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """Turn a query into a vector.

        :param text: the query.
        :returns: "embedding": a list of `dim` numbers.
        :raises TypeError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"OnnxsimTextEmbedder takes a string, got {type(text).__name__}; "
                "OnnxsimDocumentEmbedder takes a list of Documents"
            )
        vector = self._model.get().encode_query(
            text,
            prompt=self.prompt,
            normalize_embeddings=self.normalize_embeddings,
            truncate_dim=self.truncate_dim,
        )
        return {"embedding": vector.tolist()}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, list[float]]:
        """Turn a query into a vector, as `run` does, in a thread: the event loop does not wait."""
        return await asyncio.to_thread(self.run, text)


def _model_parameters(settings: ModelSettings) -> dict[str, Any]:
    """Return the arguments of a constructor that say which model it is."""
    return {
        "model": settings.name,
        "precision": settings.precision,
        "device": settings.device,
        "threads": settings.threads,
    }
