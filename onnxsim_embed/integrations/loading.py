"""Shared by the adapters: a model that loads on first use, and encoding with an adapter's options."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from onnxsim_embed.runtime.embedder import Embedder
from onnxsim_embed.runtime.texts import check_iterable

# Adapters with equal settings share one model while any of them lives: a pipeline often embeds
# documents with one component and queries with another, and a grid search clones its steps.
_models: WeakValueDictionary[ModelSettings, Embedder] = WeakValueDictionary()
_loading = threading.Lock()

# Attributes of adapters that are arguments of `encode`.
OPTIONS = ("normalize_embeddings", "truncate_dim", "long_texts")


@dataclass(frozen=True)
class ModelSettings:
    """Arguments of `Embedder.from_pretrained`."""

    name: str
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None


class LazyModel:
    """A model that is loaded on first use. Pickles and copies carry only its settings."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings
        self._model: Embedder | None = None

    def get(self) -> Embedder:
        """Return the model; the first call loads it and raises as `Embedder.from_pretrained`."""
        if self._model is None:
            with _loading:
                self._model = _models.get(self.settings)
                if self._model is None:
                    options = vars(self.settings).copy()
                    self._model = Embedder.from_pretrained(options.pop("name"), **options)
                    _models[self.settings] = self._model
        return self._model

    def __getstate__(self) -> dict[str, object]:
        return {"settings": self.settings, "_model": None}


@dataclass(eq=False, repr=False, kw_only=True)
class ModelOptions:
    """Arguments that adapters share, as attributes; a subclass gives `model` its default.

    :param model: recipe name, artifact directory, checkpoint directory or Hub id.
    :param precision: as for `Embedder`, as are `device` and `threads`.
    :param normalize_embeddings: as for `Embedder.encode`, as are `truncate_dim` and `long_texts`.
    """

    model: str | Path | Embedder = field(kw_only=False)
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    normalize_embeddings: bool | None = None
    truncate_dim: int | None = None
    long_texts: str = "truncate"

    def _load(self) -> Embedder:
        """Return the model that the attributes name, which may have changed since it was loaded."""
        if isinstance(self.model, Embedder):
            return self.model
        settings = ModelSettings(str(self.model), self.precision, self.device, self.threads)
        model: LazyModel | None = vars(self).get("_model")
        if model is None or model.settings != settings:
            model = self._model = LazyModel(settings)
        return model.get()


def embed_documents(adapter: Any, texts: Iterable[str], prompt: str | None) -> list[list[float]]:  # noqa: ANN401
    """Return the embeddings of documents with the options that are attributes of an adapter."""
    check_iterable(texts)
    names = (*OPTIONS, "batch_size", "show_progress_bar")
    options: dict[str, Any] = {n: getattr(adapter, n) for n in names if hasattr(adapter, n)}
    vectors: list[list[float]] = (
        adapter._load().encode_document(texts, prompt=prompt, **options).tolist()
    )
    return vectors


def embed_query(adapter: Any, text: str, prompt: str | None) -> list[float]:  # noqa: ANN401
    """Return the embedding of a query with the options that are attributes of an adapter."""
    if not isinstance(text, str):
        raise TypeError(f"expected one text as a string, got {type(text).__name__}")
    options = {name: getattr(adapter, name) for name in OPTIONS}
    numbers: list[float] = adapter._load().encode_query(text, prompt=prompt, **options).tolist()
    return numbers
