"""Chroma: an embedding function on this package's models, and one in the place of Chroma's default."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsim_embed.errors import needs_extra
from onnxsim_embed.integrations.loading import ModelOptions, options_of

with needs_extra("onnxsim_embed.integrations.chroma", "chroma", "chromadb"):
    from chromadb.api.types import Documents, EmbeddingFunction, Space
    from chromadb.utils.embedding_functions import register_embedding_function

RUNTIME = ("precision", "device", "threads")  # settings that leave the meaning of vectors alone


@dataclass(eq=False, repr=False, kw_only=True)
class OnnxsimEmbeddingFunction(ModelOptions, EmbeddingFunction[Documents]):
    """Chroma embedding function: documents by `encode_document`, queries by `encode_query`.

    The model is loaded on first use. The arguments are kept in the configuration of a collection, which
    Chroma builds the function from again: a program that opens the collection later only imports this
    module. For collections of Chroma's default function see `OnnxsimDefaultEmbeddingFunction`.

    :param model: recipe name, artifact directory (kept as an absolute path), checkpoint or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param query_prompt: string prepended to each query; None for the model's "query" prompt.
    :param document_prompt: string prepended to each document; None for the model's own.
    :param normalize_embeddings: as for `Embedder.encode`, as are `truncate_dim` and `long_texts`.
    :raises MissingExtraError: at import, if chromadb is not installed.

    Usage::

        import chromadb
        from onnxsim_embed.integrations.chroma import OnnxsimEmbeddingFunction

        embed = OnnxsimEmbeddingFunction("all-MiniLM-L6-v2")
        collection = chromadb.Client().create_collection("usage", embedding_function=embed)
        collection.add(ids=["a", "b"], documents=["feeder roads", "cold chain for vaccines"])
        print(collection.query(query_texts=["immunisation"], n_results=1)["documents"][0][0])
    """

    model: str | Path = field(default="all-MiniLM-L6-v2", kw_only=False)
    query_prompt: str | None = None
    document_prompt: str | None = None

    def __post_init__(self) -> None:
        self.model = str(Path(self.model).resolve() if Path(self.model).is_dir() else self.model)

    def __call__(self, input: Documents) -> list[npt.NDArray[np.float32]]:
        """Return the embeddings of documents.

        :param input: n documents.
        :returns: n float32 arrays (dim,).
        """
        options = options_of(self)
        return list(self._load().encode_document(input, prompt=self.document_prompt, **options))

    def embed_query(self, input: Documents) -> list[npt.NDArray[np.float32]]:
        """Return the embeddings of queries, as `__call__` those of documents."""
        return list(self._load().encode_query(input, prompt=self.query_prompt, **options_of(self)))

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma stores this function."""
        return "onnxsim_embed"

    def default_space(self) -> Space:
        """Return the distance of new collections."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, which Chroma stores with a collection."""
        return asdict(self)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> OnnxsimEmbeddingFunction:
        """Return the function of a stored configuration."""
        return OnnxsimEmbeddingFunction(**config)

    def validate_config_update(
        self, old_config: dict[str, Any], new_config: dict[str, Any]
    ) -> None:
        """Raise ValueError for a change of the vectors: precision, device and threads may change."""
        for name, old in old_config.items():
            if name not in RUNTIME and new_config.get(name) != old:
                raise ValueError(
                    f"the collection holds vectors of {name}={old!r}, not {new_config.get(name)!r}: "
                    "make a new collection"
                )


register_embedding_function(OnnxsimEmbeddingFunction)


class OnnxsimDefaultEmbeddingFunction(OnnxsimEmbeddingFunction):
    """Chroma's default embedding function (all-MiniLM-L6-v2 in float32), computed by this package.

    It has the name and the empty configuration of Chroma's own, so that collections that were made with
    the default open with it, and those made with it open without this package. Vectors agree within
    1e-5. Chroma's default then runs on this package wherever the process opens a collection.

    :param threads: as for `Embedder`.

    Usage::

        import chromadb
        from onnxsim_embed.integrations.chroma import OnnxsimDefaultEmbeddingFunction

        client = chromadb.PersistentClient("database")
        embed = OnnxsimDefaultEmbeddingFunction()
        collection = client.get_collection("made-with-the-default", embedding_function=embed)
    """

    def __init__(self, *, threads: int | None = None) -> None:
        super().__init__(precision="fp32", threads=threads)

    @staticmethod
    def name() -> str:
        """Return the name of Chroma's default."""
        return "default"

    def default_space(self) -> Space:
        """Return the distance of new collections with Chroma's default: squared Euclidean."""
        return "l2"

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of Chroma's default, which is empty."""
        return {}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> OnnxsimDefaultEmbeddingFunction:
        """Return the function."""
        return OnnxsimDefaultEmbeddingFunction()
